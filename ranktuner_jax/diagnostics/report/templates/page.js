"use strict";
(() => {
  const root = document.documentElement;
  const byId = (id) => document.getElementById(id);
  const read = (element) => JSON.parse(element.textContent);
  const themes = read(byId("themes"));

  // ---- light and dark -------------------------------------------------------------------------
  const system = matchMedia("(prefers-color-scheme: dark)");
  let chosen = null;
  const isDark = () => (chosen ?? (system.matches ? "dark" : "light")) === "dark";
  const button = byId("theme");
  const applyTheme = () => {
    root.dataset.theme = isDark() ? "dark" : "light";
    button.textContent = isDark() ? "Light" : "Dark";
    button.setAttribute("aria-label", isDark() ? "Switch to the light theme" : "Switch to the dark theme");
    drawAll();
  };
  button.addEventListener("click", () => { chosen = isDark() ? "light" : "dark"; applyTheme(); });
  system.addEventListener("change", applyTheme);

  // ---- figures --------------------------------------------------------------------------------
  const figures = [...document.querySelectorAll("figure")].map((figure) => ({
    place: figure.querySelector(".chart"), spec: read(figure.querySelector(".spec")), view: null,
  }));
  const narrow = matchMedia("(max-width: 600px)");
  let drawing = 0;
  async function drawAll() {
    const mine = ++drawing;
    const config = themes[isDark() ? "dark" : "light"];
    for (const figure of figures) {
      const spec = structuredClone(figure.spec);
      if (narrow.matches && spec.layer) {
        spec.layer = spec.layer.filter((layer) => !(layer.name ?? "").startsWith("numbers"));
      }
      // The interpreter in place of generated code: the page allows no eval.
      const result = await vegaEmbed(figure.place, spec, {
        actions: false, ast: true, config, renderer: "svg", tooltip: { theme: "custom" },
      });
      if (mine !== drawing) { result.finalize(); return; }
      figure.view?.finalize();
      figure.view = result;
    }
    root.dataset.drawn = String(figures.length);
  }
  narrow.addEventListener("change", drawAll);

  // ---- tables by method -----------------------------------------------------------------------
  for (const block of document.querySelectorAll(".switched")) {
    const choices = [...block.querySelectorAll(".choice")];
    const select = block.querySelector("select");
    const show = () => choices.forEach((choice, i) => { choice.hidden = i !== select.selectedIndex; });
    select.addEventListener("change", show);
    show();
  }

  // ---- conversations --------------------------------------------------------------------------
  const source = byId("conversations");
  if (source) reader(read(source));

  function make(tag, text, className) {
    const element = document.createElement(tag);
    if (text !== undefined) element.textContent = text;
    if (className) element.className = className;
    return element;
  }

  function reader({ columns, methods, means, conversations }) {
    const [which, colour, text, numbers] = ["which", "colour", "conversation", "numbers"].map(byId);
    const index = Object.fromEntries(columns.map((name, i) => [name, i + 1]));
    const WEIGHTS = columns.length + 1, ALTERNATIVES = columns.length + 2;
    conversations.forEach((one, i) => which.append(new Option(`${i + 1}: ${one.title}`)));
    colour.append(new Option("I, relative rank"));
    methods.forEach((name) => colour.append(new Option(`weight: ${name}`)));
    let picked = null;

    // Limits between the nine colours. I: rank better (blue) or worse (orange) than expected;
    // weights: lighter (blue) or heavier (orange) than the method's mean over all tokens.
    const limits = {
      I: [0.6, 0.75, 0.87, 0.95, 1.05, 1.15, 1.35, 1.6],
      weight: [4, 2.5, 1.6, 1.15, 1 / 1.15, 1 / 1.6, 1 / 2.5, 0.25],
    };
    const place = (value, borders) => {
      const falling = borders[0] > borders[1];
      const found = borders.findIndex((border) => (falling ? value > border : value < border));
      return found < 0 ? 8 : found;
    };
    const method = () => colour.selectedIndex - 1;
    const classOf = (token) => method() < 0
      ? place(token[index.I], limits.I)
      : place(token[WEIGHTS][method()] / (means[method()] || 1), limits.weight);

    const show = (number) => {
      if (number === 0) return "0";
      const size = Math.abs(number);
      return size < 1e-3 || size >= 1e6 ? number.toExponential(1) : String(+number.toPrecision(3));
    };
    const visible = (token) => token.replace(/\n/g, "⏎").replace(/\t/g, "⇥").replace(/ /g, "␣") || "(empty)";

    function legend() {
      const names = method() < 0
        ? ["below 0.6", "to 0.75", "to 0.87", "to 0.95", "around 1", "from 1.05", "from 1.15", "from 1.35", "over 1.6"]
        : ["over 4 × mean", "2.5 ×", "1.6 ×", "1.15 ×", "the mean", "below 0.87 ×", "0.63 ×", "0.4 ×", "0.25 ×"];
      byId("legend").replaceChildren(...names.map((name, i) => make("li", name, `c${i}`)));
      byId("legend").setAttribute("aria-label", method() < 0
        ? "Colours of I: orange where the label ranks worse than expected, blue where better"
        : "Colours of the weight as a multiple of the method's mean over all tokens");
    }

    function table(rows, head) {
      const element = make("table");
      if (head) {
        const row = element.createTHead().insertRow();
        head.forEach((name, i) => { const th = make("th", name, i ? "" : "text"); th.scope = "col"; row.append(th); });
      }
      const body = element.createTBody();
      for (const cells of rows) {
        const row = body.insertRow();
        cells.forEach((cell, i) => row.append(make("td", cell, i ? "" : "text")));
      }
      return element;
    }

    function pick(span) {
      picked?.classList.remove("picked");
      picked?.setAttribute("tabindex", "-1");
      picked = span;
      span.classList.add("picked");
      span.setAttribute("tabindex", "0");
      const token = conversations[which.selectedIndex].tokens[+span.dataset.i];
      const title = make("h3");
      title.append("Token ", make("span", visible(token[0]), "token-shown"),
        ` at position ${token[index.position]}`);
      const two = make("div", undefined, "two");
      const half = Math.ceil((columns.length - 1) / 2);
      const facts = columns.slice(1).map((name) => [name, show(token[index[name]])]);
      two.append(table(facts.slice(0, half)), table(facts.slice(half)));
      const alternatives = table(
        token[ALTERNATIVES].map(([other, p]) => [visible(other), show(p)]), ["likeliest", "p"]);
      const weights = table(
        methods.map((name, i) => [name, show(token[WEIGHTS][i]),
          means[i] ? `${show(token[WEIGHTS][i] / means[i])} ×` : "–"]),
        ["method", "weight", "of its mean"]);
      numbers.replaceChildren(title, two, alternatives, weights);
    }

    function paint() {
      for (const span of text.querySelectorAll(".t")) {
        const token = conversations[which.selectedIndex].tokens[+span.dataset.i];
        span.className = `t c${classOf(token)}${span === picked ? " picked" : ""}`;
      }
      legend();
    }

    function open() {
      const one = conversations[which.selectedIndex];
      picked = null;
      byId("reason").textContent = one.note;
      text.replaceChildren(...one.tokens.map((token, i) => {
        if (typeof token === "string") return make("span", token, "u");
        const span = make("span", token[0] || "∅", "t");
        span.dataset.i = i;
        span.tabIndex = -1;
        return span;
      }));
      text.scrollTop = 0;
      const first = text.querySelector(".t");
      if (first) pick(first); else numbers.replaceChildren();
      paint();
    }

    const spanOf = (event) => event.target.closest?.(".t");
    for (const kind of ["mouseover", "focusin", "click"]) {
      text.addEventListener(kind, (event) => { const span = spanOf(event); if (span && span !== picked) pick(span); });
    }
    text.addEventListener("keydown", (event) => {
      const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
      const all = [...text.querySelectorAll(".t")];
      const now = all.indexOf(picked);
      const next = event.key === "Home" ? 0 : event.key === "End" ? all.length - 1 : step && now + step;
      if (next === undefined || !all[next]) return;
      event.preventDefault();
      all[next].focus();
    });
    const turn = (step) => {
      which.selectedIndex = (which.selectedIndex + step + conversations.length) % conversations.length;
      open();
    };
    byId("previous").addEventListener("click", () => turn(-1));
    byId("next").addEventListener("click", () => turn(1));
    which.addEventListener("change", open);
    colour.addEventListener("change", paint);
    open();
  }

  applyTheme();
})();
