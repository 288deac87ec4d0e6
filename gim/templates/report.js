"use strict";
(() => {
  const box = document.getElementById("tokens");
  const tip = document.getElementById("tip");
  const tokens = [...box.querySelectorAll("span[data-s]")];
  if (!tokens.length) return;
  const position = (token) => Number(token.id.slice(1));

  // One stop for the tab key; arrow keys move it, because a stop for each token would be thousands.
  let current = tokens[0];
  const choose = (token) => {
    current.tabIndex = -1;
    current = token;
    current.tabIndex = 0;
  };
  choose(current);
  // Only what has a tab index can be focused, so it is set first.
  const go = (token, options) => {
    choose(token);
    token.focus(options);
  };

  const show = (token) => {
    const word = document.createElement("strong");
    const copy = token.cloneNode(true);
    for (const end of copy.querySelectorAll("b")) end.replaceWith("\u21b5");
    word.textContent = token.dataset.s;
    tip.replaceChildren(word, ` \u00b7 ${token.id[0] === "a" ? "answer " : ""}token ${position(token)} \u00b7 \u201c${copy.textContent.replaceAll("\n", "")}\u201d`);
    if (token.classList.contains("s")) tip.append(" \u00b7 set aside, not on the scale");
    const at = token.getClientRects()[0] || token.getBoundingClientRect();
    const size = tip.getBoundingClientRect();
    const above = at.top - size.height - 6;
    tip.style.left = `${Math.max(8, Math.min(at.left, innerWidth - size.width - 8))}px`;
    tip.style.top = `${above > 4 ? above : at.bottom + 6}px`;
    tip.classList.add("on");
    token.setAttribute("aria-describedby", "tip");
  };
  const hide = (token) => {
    tip.classList.remove("on");
    if (token) token.removeAttribute("aria-describedby");
  };
  const tokenOf = (event) => event.target.closest("span[data-s]");

  box.addEventListener("pointerover", (event) => { const token = tokenOf(event); if (token) show(token); });
  box.addEventListener("pointerout", (event) => hide(tokenOf(event)));
  box.addEventListener("focusin", (event) => { const token = tokenOf(event); if (token) { choose(token); show(token); } });
  box.addEventListener("focusout", (event) => hide(tokenOf(event)));
  box.addEventListener("click", (event) => { const token = tokenOf(event); if (token) go(token, { preventScroll: true }); });

  // The token in the line above or below that is nearest to the left edge of this one.
  const acrossLines = (index, step) => {
    const from = tokens[index].getClientRects()[0];
    let best = index;
    let line = null;
    for (let i = index + step; i >= 0 && i < tokens.length; i += step) {
      const at = tokens[i].getClientRects()[0];
      if (!at || Math.abs(at.top - from.top) < 8) continue;
      if (line === null) line = at.top;
      if (Math.abs(at.top - line) >= 8) break;
      if (best === index || Math.abs(at.left - from.left) < Math.abs(tokens[best].getClientRects()[0].left - from.left)) best = i;
    }
    return best;
  };
  box.addEventListener("keydown", (event) => {
    const index = tokens.indexOf(current);
    const to = {
      ArrowRight: () => index + 1, ArrowLeft: () => index - 1,
      ArrowDown: () => acrossLines(index, 1), ArrowUp: () => acrossLines(index, -1),
      Home: () => 0, End: () => tokens.length - 1,
    }[event.key];
    if (!to || event.altKey || event.ctrlKey || event.metaKey) return;
    event.preventDefault();
    go(tokens[Math.max(0, Math.min(tokens.length - 1, to()))]);
  });
  document.addEventListener("keydown", (event) => { if (event.key === "Escape") hide(current); });
  addEventListener("scroll", () => { if (document.activeElement !== current) hide(null); }, { passive: true });

  // Links from the tables: the token is focused, so the keyboard goes on from there.
  document.addEventListener("click", (event) => {
    const link = event.target.closest("a[href^='#t']");
    const token = link && document.getElementById(link.hash.slice(1));
    if (!token) return;
    event.preventDefault();
    history.replaceState(null, "", link.hash);
    token.scrollIntoView({ block: "center" });
    go(token, { preventScroll: true });
  });

  // A whole answer: the prompt is coloured for the token of it that is chosen, else for all of it.
  const answer = document.getElementById("answer");
  if (answer) {
    const { prompt, levels, rows } = JSON.parse(document.getElementById("said").textContent);
    const parts = [...answer.querySelectorAll("span[role=button]")];
    const made = document.getElementById("made");
    const rowsSaid = [...made.nextElementSibling.children];
    const facts = document.getElementById("facts");
    const legend = document.querySelector(".legend");
    const ends = legend ? [legend.firstElementChild, legend.lastElementChild] : [];
    // What the page says of the whole answer, to be put back as it was.
    const first = {
      facts: [...facts.childNodes], ends: ends.map((end) => end.textContent), made: made.textContent,
      tokens: tokens.map((token) => [token.dataset.s, token.className]),
    };
    // A score of three digits as Python writes it.
    const text = (score) => {
      if (!score) return "0";
      const power = Number(score.toExponential().split("e")[1]);
      const shown = power < -4 || power > 2
        ? score.toExponential().replace(/e([+-])(\d)$/, (_, sign, digit) => `e${sign}0${digit}`)
        : String(score);
      return (score > 0 ? "+" : "") + shown;
    };
    const paint = (span, score, limit) => {
      const level = limit ? Math.round(levels * Math.max(-1, Math.min(1, score / limit))) : 0;
      for (const name of [...span.classList]) if (/^[pn]\d+$/.test(name)) span.classList.remove(name);
      if (level && !span.classList.contains("s")) span.classList.add((level > 0 ? "p" : "n") + Math.abs(level));
    };
    let chosen = -1;
    const ask = (place) => {
      chosen = place === chosen ? -1 : place;
      const { limit, scores } = chosen < 0 ? { limit: 0, scores: [] } : rows[chosen];
      tokens.forEach((token, index) => {
        if (chosen < 0) {
          [token.dataset.s, token.className] = first.tokens[index];
          return;
        }
        token.dataset.s = text(scores[position(token)]);
        paint(token, scores[position(token)], limit);
      });
      parts.forEach((part, index) => {
        part.setAttribute("aria-pressed", String(index === chosen));
        paint(part, scores[prompt + index] || 0, limit);
        if (index < chosen) part.dataset.s = text(scores[prompt + index]);
        else delete part.dataset.s;
      });
      const full = Number(limit.toPrecision(3));
      ends.forEach((end, index) => {
        end.textContent = chosen < 0 ? first.ends[index]
          : index ? `${text(full)} raises it` : `${text(-full)} lowers it`;
      });
      made.textContent = chosen < 0 ? first.made : rowsSaid[chosen].firstElementChild.textContent;
      facts.replaceChildren(...(chosen < 0 ? first.facts
        : [...rowsSaid[chosen].querySelectorAll("dt, dd")].map((one) => one.cloneNode(true))));
      hide(null);
    };
    answer.addEventListener("pointerover", (event) => { const token = tokenOf(event); if (token) show(token); });
    answer.addEventListener("pointerout", (event) => hide(tokenOf(event)));
    answer.addEventListener("focusin", (event) => { const token = tokenOf(event); if (token) show(token); });
    answer.addEventListener("focusout", (event) => hide(tokenOf(event)));
    const asked = (event) => event.target.closest("span[role=button]");
    answer.addEventListener("click", (event) => { if (asked(event)) ask(parts.indexOf(asked(event))); });
    answer.addEventListener("keydown", (event) => {
      if (asked(event) && (event.key === "Enter" || event.key === " ")) {
        event.preventDefault();
        ask(parts.indexOf(asked(event)));
      }
    });
  }

  const strip = document.getElementById("strip");
  if (!strip) return;
  const view = strip.querySelector(".view");
  strip.addEventListener("click", (event) => {
    const at = strip.getBoundingClientRect();
    const share = Math.max(0, Math.min(0.999999, (event.clientX - at.left) / at.width));
    tokens[Math.floor(share * tokens.length)].scrollIntoView({ block: "center" });
  });
  // The first token whose end is below a height; the tokens of a page are in order from top to bottom.
  const firstBelow = (height) => {
    let low = 0;
    let high = tokens.length;
    while (low < high) {
      const middle = (low + high) >> 1;
      if (tokens[middle].getBoundingClientRect().bottom > height) high = middle;
      else low = middle + 1;
    }
    return low;
  };
  let waiting = false;
  const follow = () => {
    waiting = false;
    const first = firstBelow(strip.parentElement.getBoundingClientRect().bottom);
    const last = firstBelow(innerHeight);
    view.style.left = `${(100 * first) / tokens.length}%`;
    view.style.width = `${(100 * (last - first)) / tokens.length}%`;
    view.hidden = last <= first;
  };
  const later = () => { if (!waiting) { waiting = true; requestAnimationFrame(follow); } };
  addEventListener("scroll", later, { passive: true });
  addEventListener("resize", later);
  later();
})();
