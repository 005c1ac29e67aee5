// Three charts, drawn at the size that they have: the budget against the load over time, what a step
// costs with where the engine is on that curve, and how many tokens each round gave.

import { $, count, number, svg } from "./dom.js";

const LEFT = 38;
const RIGHT = 12;

function ticks(most, wanted = 4) {
  const rough = most / wanted || 1;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((m) => m * power).find((s) => s >= rough);
  const found = [];
  for (let at = 0; at <= most + step * 1e-6; at += step) found.push(at);
  return found;
}

const short = (value) => number(value, Number.isInteger(value) ? 0 : value < 1 ? 2 : 1);

class Plot {
  constructor(node) {
    this.node = node;
    this.width = node.clientWidth || 320;
    this.height = node.clientHeight || 240;
    node.setAttribute("viewBox", `0 0 ${this.width} ${this.height}`);
    node.replaceChildren();
  }

  // A frame between two heights, with room for what is to be drawn.
  frame(top, bottom, xMost, yMost) {
    const x = (value) => LEFT + (value / xMost) * (this.width - LEFT - RIGHT);
    const y = (value) => bottom - (value / yMost) * (bottom - top);
    return { x, y, top, bottom, xMost, yMost };
  }

  axes(frame, { xTicks = true, wanted = 4 } = {}) {
    for (const value of ticks(frame.yMost, wanted)) {
      const at = frame.y(value);
      if (value) this.line("rule", LEFT, at, this.width - RIGHT, at);
      this.text(LEFT - 6, at + 4, short(value), "end");
    }
    this.line("axis", LEFT, frame.bottom, this.width - RIGHT, frame.bottom);
    if (!xTicks) return;
    for (const value of ticks(frame.xMost, this.width < 400 ? 4 : 6)) {
      this.text(frame.x(value), frame.bottom + 15, short(value), "middle");
    }
  }

  line(className, x1, y1, x2, y2) {
    this.node.append(svg("line", { class: className, x1, y1, x2, y2 }));
  }

  path(className, d) {
    this.node.append(svg("path", { class: className, d }));
  }

  dot(className, cx, cy, r) {
    this.node.append(svg("circle", { class: className, cx, cy, r }));
  }

  text(x, y, text, anchor = "start", className = "") {
    this.node.append(svg("text", { x, y, "text-anchor": anchor, class: className }, text));
  }
}

const curve = (points) => points.map(([x, y], i) => `${i ? "L" : "M"}${x.toFixed(1)} ${y.toFixed(1)}`).join("");

function staircase(points) {
  return points.map(([x, y], i) => (i ? `H${x.toFixed(1)}V${y.toFixed(1)}` : `M${x.toFixed(1)} ${y.toFixed(1)}`)).join("");
}

export function drawBudget(rounds, shown) {
  const plot = new Plot($("budget"));
  const drafted = rounds.filter((round) => round.drafts.length || round.round > 0);
  const start = rounds.length ? rounds[0].time_s : 0;
  const seconds = (round) => round.time_s - start;
  const each = (round) => round.verified / round.requests;
  const allowed = (round) => (round.budget === null ? 0 : round.budget / round.requests);
  const span = Math.max(0.1, ...drafted.map(seconds));
  const most = Math.max(1, ...drafted.map(each), ...drafted.map(allowed));
  const middle = plot.height * 0.6;
  const upper = plot.frame(22, middle - 12, span, most);
  const lower = plot.frame(middle + 18, plot.height - 34, span, Math.max(2, ...drafted.map((r) => r.requests)));
  plot.text(2, 13, "guesses per request", "start", "strong");
  plot.axes(upper, { xTicks: false, wanted: 4 });
  plot.text(2, middle + 10, "requests in the round", "start", "strong");
  plot.axes(lower, { wanted: 2 });
  plot.text(plot.width - RIGHT, plot.height - 3, "seconds", "end");
  if (!drafted.length) {
    plot.text(plot.width / 2, plot.height * 0.35, "no round yet", "middle");
    return;
  }
  const load = drafted.map((r) => [lower.x(seconds(r)), lower.y(r.requests)]);
  const first = load[0][0].toFixed(1);
  const last = load.at(-1)[0].toFixed(1);
  plot.path("others", `${staircase(load)}L${last} ${lower.bottom}L${first} ${lower.bottom}Z`);
  plot.path("others-edge", staircase(load));
  plot.path("sent", staircase(drafted.map((r) => [upper.x(seconds(r)), upper.y(each(r))])));
  if (drafted.some((r) => r.budget !== null)) {
    plot.path("allowed", staircase(drafted.map((r) => [upper.x(seconds(r)), upper.y(allowed(r))])));
    plot.text(plot.width - RIGHT, 13, "╌ allowed   ━ checked", "end");
  }
  if (shown) {
    const at = upper.x(seconds(shown));
    plot.line("cursor", at, upper.top, at, lower.bottom);
  }
}

export function describeBudget(rounds) {
  const drafted = rounds.filter((round) => round.round > 0);
  if (!drafted.length) return "Budget against load: no round yet";
  const loads = drafted.map((round) => round.requests);
  const mean = drafted.reduce((sum, r) => sum + r.verified / r.requests, 0) / drafted.length;
  return (
    `Budget against load: over ${count(drafted.length, "round")} of ${Math.min(...loads)} to ` +
    `${Math.max(...loads)} requests, ${number(mean, 1)} guesses per request were checked on average`
  );
}

// Tokens of prompts that were read in a round, by requests that began in it.
export const promptTokens = (round) => (round.rows ?? 0) - round.requests - round.verified;

// The table is of rounds that read no prompt.
const isComparable = (round) => round.rows !== null && promptTokens(round) === 0;

const spent = (round) => round.draft_ms + round.schedule_ms + round.verify_ms;

export function drawCost(cost, rounds, shown) {
  const plot = new Plot($("cost"));
  const steps = rounds.filter(isComparable);
  const requests = shown?.requests ?? 1;
  const line = nearest(cost, requests);
  const points = cost?.points ?? [];
  const ends = line ? [line.first_tokens + line.step_ms.length - 1] : [];
  const rows = [...ends, ...points.map((p) => p.tokens), ...steps.map((r) => r.rows)];
  const xMost = Math.max(8, ...rows) * 1.03;
  // One slow step of a busy machine must not flatten all others.
  const times = steps.map(spent).sort((a, b) => a - b);
  const usual = times.length ? times[Math.floor(times.length * 0.95)] * 1.2 : 0;
  const now = shown && isComparable(shown) ? spent(shown) : 0;
  const yMost = Math.max(1, usual, now, ...points.map((p) => p.step_ms), ...(line?.step_ms ?? [])) * 1.08;
  const frame = plot.frame(22, plot.height - 34, xMost, yMost);
  plot.text(2, 13, "ms per step", "start", "strong");
  plot.axes(frame);
  plot.text(plot.width - RIGHT, plot.height - 3, "tokens in the step", "end");
  for (const point of points) plot.dot("measured", frame.x(point.tokens), frame.y(point.step_ms), 2.5);
  for (const round of steps.slice(-300)) {
    if (spent(round) <= yMost) plot.dot("earlier", frame.x(round.rows), frame.y(spent(round)), 3);
  }
  if (line) {
    const path = line.step_ms.map((ms, i) => [frame.x(line.first_tokens + i), frame.y(ms)]);
    plot.path("curve", curve(path));
    plot.text(plot.width - RIGHT, 13, `━ measured, ${count(line.requests, "request")}`, "end");
  }
  if (now) plot.dot("here", frame.x(shown.rows), frame.y(now), 6);
}

function nearest(cost, requests) {
  const curves = cost?.curves ?? [];
  return curves.find((each) => each.requests === requests) ?? curves.at(-1);
}

export function describeCost(cost, shown) {
  const here = shown && isComparable(shown)
    ? `this round sent ${count(shown.rows, "token")} and took ${number(spent(shown), 1)} ms`
    : "no round without prompts is shown";
  const line = nearest(cost, shown?.requests ?? 1);
  if (!line) return `Cost curve: not measured on this machine; ${here}`;
  const first = number(line.step_ms[0], 1);
  const last = number(line.step_ms.at(-1), 1);
  return (
    `Cost curve: with ${count(line.requests, "request")} from ${first} ms for ` +
    `${count(line.first_tokens, "token")} to ${last} ms for ` +
    `${line.first_tokens + line.step_ms.length - 1}; ${here}`
  );
}

const WINDOW_ROUNDS = 8;

// Tokens that a round gave: the guesses that stayed and the model's own one.
const gained = (round) =>
  round.drafts.filter((draft) => draft.accepted).length + (round.next_token ? 1 : 0);

const mean = (values) => values.reduce((sum, value) => sum + value, 0) / values.length;

export function drawAccepted(rounds, shown) {
  const plot = new Plot($("accepted"));
  const given = rounds.map(gained);
  const most = Math.max(2, ...rounds.map((round) => round.drafts.length + 1), ...given);
  const frame = plot.frame(22, plot.height - 34, Math.max(8, given.length), most);
  plot.text(2, 13, "tokens per round", "start", "strong");
  plot.axes(frame, { wanted: 4 });
  plot.text(plot.width - RIGHT, plot.height - 3, "round", "end");
  if (!given.length) return;
  given.forEach((tokens, i) => plot.dot("earlier", frame.x(i + 1), frame.y(tokens), 3));
  const recent = given.map((_, i) => mean(given.slice(Math.max(0, i + 1 - WINDOW_ROUNDS), i + 1)));
  plot.path("curve", curve(recent.map((tokens, i) => [frame.x(i + 1), frame.y(tokens)])));
  plot.text(plot.width - RIGHT, 13, `━ mean of the last ${WINDOW_ROUNDS}`, "end");
  const place = rounds.indexOf(shown);
  if (place >= 0) plot.dot("here", frame.x(place + 1), frame.y(given[place]), 6);
}

export function describeAccepted(rounds) {
  if (!rounds.length) return "Accepted length: no round yet";
  const given = rounds.map(gained);
  return (
    `Accepted length: ${number(mean(given), 2)} tokens per round over ` +
    `${count(rounds.length, "round")}, from ${Math.min(...given)} to ${Math.max(...given)}`
  );
}
