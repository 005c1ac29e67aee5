// One side of the comparison: its speed, its figures and its text.

import { $, count, element, number } from "./dom.js";

export class Side {
  constructor(id) {
    this.id = id;
    this.title = element("h3");
    this.title.id = `${id}-title`;
    this.rate = element("b", { text: "–" });
    this.bar = element("span");
    this.figures = element("p", { className: "hint" });
    this.text = element("div", { className: "text" });
    this.text.tabIndex = 0;
    this.text.setAttribute("role", "region");
    this.text.setAttribute("aria-labelledby", this.title.id);
    $(id).replaceChildren(
      this.title,
      element("p", { className: "rate" }, this.rate, element("span", { text: "tokens/s" })),
      element("div", { className: "speed" }, this.bar),
      this.figures,
      this.text,
    );
    this.clear("", "");
  }

  clear(title, waiting) {
    this.title.textContent = title;
    this.rate.textContent = "–";
    this.figures.textContent = "";
    this.text.replaceChildren(element("span", { className: "nothing", text: waiting }));
    this.isEmpty = true;
    this.tokensPerS = 0;
    this.groups = [];
    this.shown = null;
  }

  // Tokens that came together are one group, which a round can be shown by.
  add({ pieces, tokens, seconds }) {
    if (this.isEmpty) this.text.replaceChildren();
    this.isEmpty = false;
    const group = element("span");
    for (const [text, , drafted] of pieces) {
      const className = drafted ? "drafted" : "";
      group.append(element("span", { className, text }));
    }
    const atEnd = this.text.scrollHeight - this.text.scrollTop - this.text.clientHeight < 40;
    this.text.append(group);
    if (atEnd) this.text.scrollTop = this.text.scrollHeight;
    this.groups.push(group);
    this.tokensPerS = tokens / seconds;
    this.figures.textContent = `${count(tokens, "token")} in ${number(seconds, 2)} s`;
  }

  // What the server says at the end holds, whatever came before.
  end(summary) {
    this.tokensPerS = summary.tokens_per_s;
    if (summary.tokens && this.isEmpty) this.text.replaceChildren();
    const steps = summary.verified
      ? `${count(summary.rounds, "round")}, ${number(summary.accepted_length, 2)} tokens each`
      : `${count(summary.tokens, "step")}`;
    const first = `first after ${number(summary.first_token_ms)} ms`;
    this.figures.textContent =
      `${count(summary.tokens, "token")} in ${number(summary.seconds, 2)} s, ${first}; ${steps}`;
  }

  showRate(most) {
    this.rate.textContent = this.tokensPerS ? number(this.tokensPerS) : "–";
    this.bar.style.setProperty("--p", most ? this.tokensPerS / most : 0);
  }

  mark(group) {
    if (this.shown === group) return;
    this.shown?.classList.remove("current");
    this.shown = group ?? null;
    if (!group) return;
    group.classList.add("current");
    const { scrollTop, clientHeight } = this.text;
    const below = group.offsetTop + group.offsetHeight > scrollTop + clientHeight;
    if (below || group.offsetTop < scrollTop) this.text.scrollTop = group.offsetTop - 40;
  }
}
