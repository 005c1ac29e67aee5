// The rounds of a run: which one is shown, at what pace, and all that is drawn of them.

import {
  describeAccepted,
  describeBudget,
  describeCost,
  drawAccepted,
  drawBudget,
  drawCost,
} from "./charts.js";
import { $, eachFrame, element, number, visible } from "./dom.js";
import { drafterNow } from "./form.js";
import { drawRound } from "./round.js";
import { Side } from "./side.js";

const SLOW_MS = 500;
const calm = matchMedia("(prefers-reduced-motion: reduce)");

export const sides = { speculative: new Side("speculative"), plain: new Side("plain") };
let rounds = [];
let cursor = 0;
let cost = null;

export const draw = eachFrame(() => {
  const shown = rounds[cursor];
  drawRound(shown, rounds.length);
  sides.speculative.mark(shown?.group);
  $("cursor").max = Math.max(rounds.length - 1, 0);
  $("cursor").value = cursor;
  $("cursor").setAttribute("aria-valuetext", `Round ${cursor + 1} of ${rounds.length}`);
  $("cursor").disabled = rounds.length < 2;
  $("previous").disabled = cursor === 0;
  $("next").disabled = cursor >= rounds.length - 1;
  drawBudget(rounds, shown);
  drawCost(cost, rounds, shown);
  drawAccepted(rounds, shown);
  const most = Math.max(sides.speculative.tokensPerS, sides.plain.tokensPerS);
  for (const side of Object.values(sides)) side.showRate(most);
});

function move(to) {
  cursor = Math.min(Math.max(to, 0), Math.max(rounds.length - 1, 0));
  draw();
}

// Rounds are shown as they come, or two a second; a visitor who has gone back is left there.
let follows = true;
let paceTimer = 0;
const isPaced = () => $("pace").value === "slow" || calm.matches;

function keepPace() {
  clearTimeout(paceTimer);
  paceTimer = setTimeout(() => {
    if (follows && cursor < rounds.length - 1 && isPaced()) {
      move($("pace").value === "slow" ? cursor + 1 : rounds.length - 1);
    }
    keepPace();
  }, SLOW_MS);
}

export function addRound(round) {
  round.group = sides.speculative.groups.at(-1);
  rounds.push(round);
  if (rounds.length === 1) keepPace();
  if (follows && !isPaced()) cursor = rounds.length - 1;
  draw();
  if ($("table-box").open) addRow(round);
}

function addRow(round) {
  const kept = round.drafts.filter((draft) => draft.accepted);
  const tokens = [...kept, ...(round.next_token ? [round.next_token] : [])];
  const ms = round.draft_ms + round.schedule_ms + round.verify_ms;
  const cells = [
    round.round + 1,
    round.drafts.length,
    round.drafts.filter((draft) => draft.sent).length,
    kept.length,
    tokens.map((token) => visible(token.text)).join(" "),
    round.requests,
    number(ms, 1),
  ];
  $("rows").append(element("tr", {}, ...cells.map((text) => element("td", { text: String(text) }))));
}

export function describe() {
  $("budget").setAttribute("aria-label", describeBudget(rounds));
  $("cost").setAttribute("aria-label", describeCost(cost, rounds[cursor]));
  $("accepted").setAttribute("aria-label", describeAccepted(rounds));
}

export function showCost() {
  cost = drafterNow()?.cost ?? null;
  const drafts = (drafterNow()?.drafts ?? 0) > 0;
  $("cost-hint").textContent =
    cost || !drafts ? "" : "Nobody has measured this machine with this drafter yet: dspark profile does.";
  draw();
  describe();
}

export function clearRounds() {
  rounds = [];
  follows = true;
  $("rows").replaceChildren();
  move(0);
}

function step(by) {
  move(cursor + by);
  follows = cursor === rounds.length - 1;
  describe();
}

// What a visitor does with them; `isRunning` tells whether a run takes place.
export function watchRounds(isRunning) {
  $("previous").addEventListener("click", () => step(-1));
  $("next").addEventListener("click", () => step(1));
  $("cursor").addEventListener("input", () => {
    follows = Number($("cursor").value) === rounds.length - 1;
    move(Number($("cursor").value));
    describe();
  });
  $("pace").addEventListener("change", () => {
    follows = true;
    if ($("pace").value === "live") move(rounds.length - 1);
    else if (!isRunning()) move(0);
    keepPace();
  });
  $("table-box").addEventListener("toggle", () => {
    $("rows").replaceChildren();
    if ($("table-box").open) rounds.forEach(addRow);
  });
  new ResizeObserver(draw).observe($("budget"));
}
