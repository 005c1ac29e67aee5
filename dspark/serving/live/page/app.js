// The page: one connection that says how the server stands, and runs with what they show.

import { ApiError, ask, stream, useKey } from "./api.js";
import { $, count, element, number } from "./dom.js";
import { complain, drafterNow, fill, fillFrom, watchForm, wishes } from "./form.js";
import { addRound, clearRounds, describe, draw, showCost, sides, watchRounds } from "./rounds.js";

const LINK = "#run=";
const VISITED = "dspark-visited";
const FIRST_RUN_TOKENS = 64;
const LONGEST_WAIT_S = 8;

let run = null; // { id, control } while one takes place

// ---- what is shown -------------------------------------------------------------------------

function say(text, state = "") {
  $("status").textContent = text;
  $("status").dataset.state = state;
}

function remark(text) {
  $("notes").append(element("li", { text }));
}

// ---- a run ---------------------------------------------------------------------------------

const SAYS = {
  waiting: ({ ahead }) => `Another visitor's run goes first (${ahead} ahead of yours).`,
  preparing: () => "Preparing the engine.",
  loading: ({ load }) => `Starting ${count(load, "background request")}.`,
  decoding: ({ side }) =>
    side === "plain" ? "Decoding the same prompt plainly." : "Decoding with the drafter.",
};

function clear(wish) {
  clearRounds();
  $("notes").replaceChildren();
  $("verdict").textContent = "";
  const drafts = (drafterNow()?.drafts ?? 0) > 0 && wish.schedule !== "off";
  const name = drafterNow()?.label;
  sides.speculative.clear(
    drafts ? `With ${name}, schedule ${wish.schedule}` : "With a drafter",
    drafts ? "" : "No drafter was chosen.",
  );
  sides.plain.clear("Plain decoding", drafts ? (wish.compare ? "Comes second." : "Not asked for.") : "");
  showCost();
}

const handlers = {
  start: ({ run_id }) => {
    run.id = run_id;
  },
  phase: (body) => say(SAYS[body.phase](body)),
  note: ({ message }) => remark(message),
  text: (body) => {
    sides[body.side].add(body);
    draw();
  },
  round: addRound,
  end: (summary) => {
    sides[summary.side].end(summary);
    run.ended.push(summary);
    if (summary.other_steps) {
      remark(
        `Other requests took ${count(summary.other_steps, "step")} of this server meanwhile: ` +
          `the speed of the ${summary.side} side is too low.`,
      );
    }
    draw();
    describe();
  },
  done: (body) => {
    run.isDone = true;
    conclude(body);
  },
  error: ({ error }) => {
    throw new ApiError(0, error.message);
  },
};

function conclude({ identical, speedup, load_changed: changed }) {
  const [first] = run.ended;
  if (run.ended.length === 2) {
    const times = changed
      ? "The load was changed on the way, so the speeds do not compare"
      : `${number(speedup, 2)} times the speed of plain decoding`;
    const text = identical === null
      ? "sampled from the same law with other draws, so the words differ"
      : identical ? "the same text, token by token" : "but the two texts differ";
    $("verdict").textContent = `${times}; ${text}.`;
    if (identical === false) {
      remark(
        "At temperature 0 the texts can differ where the model's numbers hang on the batch, as " +
          "in bfloat16; batch-invariant mode excludes that.",
      );
    }
  }
  say(`Done: ${count(first.tokens, "token")} in ${number(first.seconds, 2)} seconds.`);
}

async function start() {
  const wish = wishes();
  if (!wish) return;
  run = { id: null, control: new AbortController(), ended: [], isDone: false };
  $("go").textContent = "Stop";
  clear(wish);
  $("link").href = LINK + encodeURIComponent(JSON.stringify(wish));
  $("link-row").hidden = false;
  say("Asking the server.");
  const { top } = $("status").getBoundingClientRect();
  if (top < 0 || top > innerHeight - 80) $("status").scrollIntoView();
  try {
    const options = { method: "POST", body: wish, signal: run.control.signal };
    for await (const [name, body] of stream("/v1/dspark/live", options)) handlers[name]?.(body);
    if (!run.isDone) throw new ApiError(0, "The server broke the run off.");
  } catch (error) {
    if (run.control.signal.aborted) say("Stopped.");
    else if (error instanceof ApiError && error.status === 401) wantKey("The key is missing or wrong.");
    else if (error instanceof ApiError) say(error.message, "error");
    else if (error instanceof TypeError) say("The connection to the server was lost.", "error");
    else throw error;
  } finally {
    run = null;
    $("go").textContent = "Run";
    $("go").disabled = !connected;
    draw();
    describe();
  }
}

let loadTimer = 0;
function changeLoad(load) {
  clearTimeout(loadTimer);
  loadTimer = setTimeout(async () => {
    if (!run?.id) return;
    try {
      await ask(`/v1/dspark/live/${run.id}/load`, { method: "PUT", body: { load } });
    } catch {
      // The run has just ended; the next one takes the new load.
    }
  }, 120);
}

// ---- the connection ------------------------------------------------------------------------

let connected = false;
let keyGiven = () => {};

function showConnection(state, text) {
  connected = state === "connected";
  $("connection").dataset.state = state;
  if ($("connection").textContent !== text) $("connection").textContent = text;
  if (!run) $("go").disabled = !connected;
}

function showState(state) {
  const others = state.running + state.queued;
  showConnection("connected", others ? `Connected, ${count(others, "other request")}` : "Connected");
}

function showModel({ model, device, dtype }) {
  const own = model.dspark;
  $("model").textContent =
    `${model.id} on ${device}, ${dtype}; context of ${number(model.max_model_len)} tokens, ` +
    `${count(own.max_requests, "request")} at once`;
}

// A link fills the form in, once; nothing runs before the visitor says so.
let isLinkOpen = false;
function openLink() {
  if (isLinkOpen || !location.hash.startsWith(LINK)) return;
  isLinkOpen = true;
  try {
    fillFrom(JSON.parse(decodeURIComponent(location.hash.slice(LINK.length))));
    say("This link holds a run; press Run to repeat it.");
  } catch {
    say("The link to a run is damaged; type a prompt or pick an example.", "error");
  }
}

// The first visit with a browser begins with a short run, unless somebody else is being served.
let isGreeted = false;
function greet({ running, queued, live_runs: liveRuns }) {
  if (isGreeted) return;
  isGreeted = true;
  if (isLinkOpen || run || running + queued + liveRuns > 0 || !isFirstVisit()) return;
  const chosen = $("max-tokens").value;
  $("max-tokens").value = Math.min(FIRST_RUN_TOKENS, Number($("max-tokens").max));
  const begun = start();
  $("max-tokens").value = chosen;
  begun.then(() => remark("Your first visit began with this example; now ask something of your own."));
}

function isFirstVisit() {
  try {
    const isFirst = localStorage.getItem(VISITED) === null;
    localStorage.setItem(VISITED, "1");
    return isFirst;
  } catch {
    return false; // storage is switched off: every visit would be the first
  }
}

addEventListener("hashchange", () => {
  isLinkOpen = false;
  if (connected && !run) openLink();
});

function wantKey(message) {
  $("key-form").hidden = false;
  $("key-error").textContent = message;
  $("key").focus();
}

async function connect() {
  const options = await ask("/v1/dspark/live");
  $("key-form").hidden = true;
  showModel(options);
  fill(options);
  openLink();
  showCost();
  for await (const [name, body] of stream("/v1/dspark/events?rounds=false")) {
    if (name === "state") {
      showState(body);
      greet(body);
    }
  }
}

async function stayConnected() {
  for (let wait = 1; ; ) {
    try {
      await connect();
    } catch (error) {
      if (error instanceof ApiError && error.status === 401) {
        showConnection("disconnected", "Key wanted");
        const given = new Promise((resolve) => (keyGiven = resolve));
        wantKey($("key").value ? "The server does not know this key." : "");
        await given;
        continue;
      }
      if (!(error instanceof TypeError || error instanceof ApiError)) throw error;
    }
    wait = connected ? 1 : Math.min(wait * 2, LONGEST_WAIT_S);
    showConnection("disconnected", "Disconnected, trying again");
    await new Promise((resolve) => setTimeout(resolve, wait * 1000));
  }
}

// ---- what a visitor does -------------------------------------------------------------------

$("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  if (run) run.control.abort();
  else start();
});
$("prompt").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) $("ask").requestSubmit();
});
$("prompt").addEventListener("input", () => complain(""));
$("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  useKey($("key").value);
  keyGiven();
});
$("drafter").addEventListener("change", showCost);
$("origin").textContent = location.origin;
watchForm(changeLoad);
watchRounds(() => run !== null);
clear({ schedule: "off", compare: false });
sides.speculative.clear("With a drafter", "Its text appears here.");
sides.plain.clear("Plain decoding", "The same prompt, without a drafter.");
stayConnected();
