// One round as a row of tokens: the anchor, the guesses with their confidences and fates, and the
// token that the model wrote itself.

import { promptTokens } from "./charts.js";
import { $, count, element, number, percent, visible } from "./dom.js";

const SIGNS = { kept: "✓", refused: "✗", unsent: "–", own: "◆" };
const WORDS = { kept: "kept", refused: "refused", unsent: "not sent" };

export function fate(draft) {
  if (draft.accepted) return "kept";
  return draft.sent ? "refused" : "unsent";
}

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
  cells.push(...round.drafts.map(draftCell));
  if (round.next_token) {
    const what = !round.drafts.length ? "own" : round.is_bonus ? "bonus" : "correction";
    cells.push(markCell("own", SIGNS.own, round.next_token, what));
  }
  block.replaceChildren(...cells);
}

function draftCell(draft, index) {
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
  return labelled(cell, `Guess ${index + 1}, ${draft.text}: ${confidence}, ${WORDS[what]}`);
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
  return (
    `${place}: ${round.drafts.length} guessed, ${sent} sent, ${kept} kept, so ` +
    `${count(gained, "token")} in one step. ${took}${others}${more}.`
  );
}
