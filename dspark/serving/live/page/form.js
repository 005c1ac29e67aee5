// The form: what can be chosen here, and what was chosen.

import { $, count, element } from "./dom.js";

const SCHEDULES = {
  auto: "auto: check all while it pays",
  fixed: "fixed: check all",
  threshold: "threshold: check the sure",
  prefix: "prefix: gain against cost",
  lagged: "lagged: by earlier rounds",
  lookahead: "lookahead: lagged, refined",
  off: "off: guess nothing",
};
const VERIFIERS = {
  block: "block",
  token: "token by token",
  coupled: "coupled: plain's draws",
};

let options = null;
const asked = {};

export const drafterNow = () => options?.drafters.find((each) => each.name === $("drafter").value);

export function fill(given) {
  const first = options === null;
  options = given;
  $("ask").hidden = false;
  const drafter = $("drafter").value;
  refill($("drafter"), given.drafters.map((each) => [each.name, each.label]), drafter);
  refill($("verifier"), given.verifiers.map((name) => [name, VERIFIERS[name]]),
    first ? given.model.dspark.verifier : $("verifier").value);
  $("load").max = given.max_load;
  $("load").disabled = given.max_load === 0;
  $("max-tokens").max = given.max_length - 1;
  if (first) {
    fillSchedules(given.model.dspark.schedule);
    $("examples").replaceChildren(...Object.keys(given.examples).map(exampleButton));
    if (!$("prompt").value) pick(Object.keys(given.examples)[0]);
  } else {
    fillSchedules($("schedule").value);
  }
  showValues();
}

function refill(select, rows, chosen) {
  select.replaceChildren(
    ...rows.map(([value, text, disabled]) => {
      const option = element("option", { text });
      option.value = value;
      option.disabled = Boolean(disabled);
      return option;
    }),
  );
  const usable = rows.filter(([, , disabled]) => !disabled).map(([value]) => value);
  select.value = usable.includes(chosen) ? chosen : usable[0];
}

function fillSchedules(chosen) {
  const drafter = drafterNow();
  const drafts = drafter.drafts > 0;
  const names = Object.keys(SCHEDULES).filter((name) => name in drafter.schedules);
  refill(
    $("schedule"),
    names.map((name) => [name, SCHEDULES[name], drafter.schedules[name] !== null]),
    chosen,
  );
  for (const id of ["schedule", "verifier", "compare"]) $(id).disabled = !drafts;
  const refused = names.filter((name) => drafter.schedules[name] !== null);
  $("schedule-hint").textContent = refused.length
    ? `Unavailable: ${refused.join(", ")} (${drafter.schedules[refused[0]]})`
    : "";
}

function exampleButton(domain) {
  const button = element("button", { text: domain[0].toUpperCase() + domain.slice(1) });
  button.type = "button";
  button.addEventListener("click", () => pick(domain));
  return button;
}

function pick(domain) {
  const prompts = options.examples[domain];
  asked[domain] = ((asked[domain] ?? -1) + 1) % prompts.length;
  $("prompt").value = prompts[asked[domain]];
  complain("");
}

export function showValues() {
  $("temperature-value").textContent =
    Number($("temperature").value) === 0 ? "0, the likeliest token" : $("temperature").value;
  const load = Number($("load").value);
  $("load-value").textContent = load === 0 ? "none" : count(load, "request");
  $("load").setAttribute("aria-valuetext", $("load-value").textContent);
  $("threshold-value").textContent = $("threshold").value;
  $("threshold-row").hidden = $("schedule").value !== "threshold";
}

export function watchForm(onLoad) {
  $("ask").addEventListener("input", () => (seed = null)); // another run than the link's
  $("drafter").addEventListener("change", () => {
    fillSchedules($("schedule").value);
    showValues();
  });
  for (const id of ["schedule", "temperature", "threshold", "load"]) {
    $(id).addEventListener("input", showValues);
  }
  $("load").addEventListener("input", () => onLoad(Number($("load").value)));
}

// A run as a link holds it: what the form says, and the seed, which no field shows.
let seed = null;

// Fills the form in from a link; what the server does not offer stays as it is.
export function fillFrom(wish) {
  for (const id of ["drafter", "verifier", "schedule"]) {
    const usable = [...$(id).options].some((each) => each.value === wish[id] && !each.disabled);
    if (usable) $(id).value = wish[id];
    if (id === "drafter") fillSchedules($("schedule").value);
  }
  if (typeof wish.prompt === "string") $("prompt").value = wish.prompt;
  for (const [id, value] of [
    ["threshold", wish.threshold],
    ["temperature", wish.temperature],
    ["max-tokens", wish.max_tokens],
    ["load", wish.load],
  ]) {
    if (Number.isFinite(value)) $(id).value = value;
  }
  $("past-end").checked = wish.ignore_eos === true;
  $("compare").checked = wish.compare !== false;
  seed = Number.isSafeInteger(wish.seed) && wish.seed >= 0 ? wish.seed : null;
  showValues();
}

export function complain(message) {
  $("form-error").textContent = message;
  $("prompt").setAttribute("aria-invalid", message ? "true" : "false");
}

// What the visitor wants, or null where the form cannot be sent; the form then says why.
export function wishes() {
  const prompt = $("prompt").value;
  if (!prompt.trim()) {
    complain("Type a prompt first, or pick an example.");
    $("prompt").focus();
    return null;
  }
  const most = Number($("max-tokens").max);
  const tokens = Number($("max-tokens").value);
  if (!Number.isInteger(tokens) || tokens < 1 || tokens > most) {
    complain(`Tokens at most must be a whole number from 1 to ${most}.`);
    $("max-tokens").focus();
    return null;
  }
  complain("");
  const temperature = Number($("temperature").value);
  const schedule = $("schedule").value;
  return {
    prompt,
    drafter: $("drafter").value,
    verifier: $("verifier").value,
    schedule,
    threshold: schedule === "threshold" ? Number($("threshold").value) : null,
    temperature,
    max_tokens: tokens,
    ignore_eos: $("past-end").checked,
    load: Number($("load").value),
    seed: temperature === 0 ? 0 : (seed ?? Math.floor(Math.random() * 2 ** 31)),
    compare: $("compare").checked,
  };
}
