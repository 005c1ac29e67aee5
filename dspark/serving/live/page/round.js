// One round as a row of tokens: the anchor, the guesses with their confidences and fates, and the
// token that the model wrote itself. A draft tree spreads over rows: a first child stands beside its
// parent, the others begin a row below.

import { promptTokens } from "./charts.js";
import { $, count, element, number, percent, visible } from "./dom.js";

const SIGNS = { kept: "✓", refused: "✗", unsent: "–", own: "◆" };
const WORDS = { kept: "kept", refused: "refused", unsent: "not sent" };

export function fate(draft) {
  if (draft.accepted) return "kept";
  return draft.sent ? "refused" : "unsent";
}

const branches = (round) => round.drafts.some((draft, index) => draft.parent !== index - 1);

let drawn = null; // the round that the block shows

export function drawRound(round, total) {
  $("round-text").textContent = round ? sentence(round, total) : "No round yet.";
  if (drawn === round) return;
  drawn = round;
  const block = $("block");
  if (!round) {
    const text = "The guesses of each round appear here.";
    block.replaceChildren(element("li", { className: "empty", text }));
    return;
  }
  const cells = [];
  if (round.anchor) cells.push(markCell("anchor", "from", round.anchor, "last token"));
  const isTree = branches(round);
  cells.push(...round.drafts.map((draft, index) => draftCell(draft, index, isTree)));
  if (round.next_token) {
    const what = !round.drafts.length ? "own" : round.is_bonus ? "bonus" : "correction";
    cells.push(markCell("own", SIGNS.own, round.next_token, what));
  }
  block.classList.toggle("tree", isTree);
  if (isTree) spread(round, cells);
  block.replaceChildren(...cells);
}

// Gives every cell of a tree its place: the column is its depth.
function spread(round, cells) {
  const parents = round.drafts.map((draft) => draft.parent);
  const kept = round.drafts.map((draft, index) => (draft.accepted ? index : -1));
  if (round.next_token) parents.push(Math.max(-1, ...kept)); // a path's nodes rise
  let lowest = 1;
  const place = (node, row, column, above) => {
    const { style } = cells[node + 1];
    style.gridRow = row;
    style.gridColumn = column;
    style.setProperty("--up", row - above);
    cells[node + 1].classList.toggle("branch", row > above);
    parents
      .flatMap((parent, child) => (parent === node ? [child] : []))
      .forEach((child, rank) => place(child, rank ? ++lowest : row, column + 1, row));
  };
  place(-1, 1, 1, 1);
}

function draftCell(draft, index, isTree) {
  const what = fate(draft);
  const fill = element("span", { className: "fill" });
  fill.style.setProperty("--p", draft.confidence ?? 0);
  const known = draft.confidence !== null;
  const sure = known ? percent(draft.confidence) : "";
  const cell = element(
    "li",
    { className: what, title: visible(draft.text) },
    element("span", { className: "track" }, fill),
    element("span", { className: "token", text: visible(draft.text) }),
    element("span", { className: "fate", text: `${SIGNS[what]} ${sure}` }),
  );
  const confidence = known ? `confidence ${sure}` : "confidence unknown";
  const before = draft.parent < 0 ? "the last token" : `guess ${draft.parent + 1}`;
  const after = isTree ? ` after ${before}` : "";
  return labelled(cell, `Guess ${index + 1}${after}, ${draft.text}: ${confidence}, ${WORDS[what]}`);
}

function markCell(className, sign, token, what) {
  const cell = element(
    "li",
    { className, title: visible(token.text) },
    element("span", { className: "mark", text: sign === "from" ? "…" : sign }),
    element("span", { className: "token", text: visible(token.text) }),
    element("span", { className: "fate", text: what }),
  );
  return labelled(cell, `${what}: ${token.text}`);
}

// A list item's own label is not read everywhere; its text, hidden from sight, is.
function labelled(cell, label) {
  for (const part of cell.children) part.setAttribute("aria-hidden", "true");
  cell.append(element("span", { className: "unseen", text: label }));
  return cell;
}

function sentence(round, total) {
  const place = `Round ${round.round + 1} of ${total}`;
  const ms = round.draft_ms + round.schedule_ms + round.verify_ms;
  const took = `${number(ms, 1)} ms (${number(round.draft_ms, 1)} to guess, ${number(round.verify_ms, 1)} to check)`;
  const others = round.requests > 1 ? `, shared by ${count(round.requests, "request")}` : "";
  const read = round.round > 0 ? promptTokens(round) : 0;
  const more = read > 0 ? `, ${count(read, "token")} of new prompts read beside` : "";
  if (!round.drafts.length) {
    const why = round.round === 0
      ? "the prompt was read, which gives the first token"
      : "nothing was guessed, for no gain was expected";
    return `${place}: ${why}. ${took}${others}${more}.`;
  }
  const sent = round.drafts.filter((draft) => draft.sent).length;
  const kept = round.drafts.filter((draft) => draft.accepted).length;
  const gained = kept + (round.next_token ? 1 : 0);
  const isTree = branches(round);
  return (
    `${place}: ${round.drafts.length} guessed${isTree ? " as a tree" : ""}, ${sent} sent, ${kept} kept, so ` +
    `${count(gained, "token")} in one step. ${took}${others}${more}.`
  );
}
