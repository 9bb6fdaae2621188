"use strict";
// Sorting, filtering and drawing. Everything it needs is in the page.
(() => {
  const filters = document.querySelector("form.filters");
  const chosen = () => Object.fromEntries(new FormData(filters));

  // --- tables: a tbody is a row with its details, so the two move together ---

  const valueOf = (body, place) => body.rows[0].cells[place].dataset.value;

  function compare(one, other) {
    const numbers = [Number(one), Number(other)];
    return numbers.some(Number.isNaN) ? one.localeCompare(other, "en", { numeric: true }) : numbers[0] - numbers[1];
  }

  function sort(table, head) {
    const direction = head.getAttribute("aria-sort") === "ascending" ? "descending" : "ascending";
    for (const other of table.tHead.rows[0].cells) other.setAttribute("aria-sort", "none");
    head.setAttribute("aria-sort", direction);
    const sign = direction === "ascending" ? 1 : -1;
    const bodies = [...table.tBodies].map((body) => [body, valueOf(body, head.cellIndex)]);
    bodies.sort(([, one], [, other]) => {
      if (one === undefined || other === undefined) return (one === undefined) - (other === undefined);
      return sign * compare(one, other);
    });
    table.append(...bodies.map(([body]) => body));
  }

  for (const table of document.querySelectorAll("table.data:not(.plain)")) {
    for (const head of table.tHead.rows[0].cells) {
      head.querySelector("button").addEventListener("click", () => sort(table, head));
    }
  }

  for (const button of document.querySelectorAll(".more")) {
    button.addEventListener("click", () => {
      const details = document.getElementById(button.getAttribute("aria-controls"));
      details.hidden = !details.hidden;
      button.setAttribute("aria-expanded", String(!details.hidden));
    });
  }

  // --- filters ---

  const views = new Map();

  function filter() {
    const { backbone, task = "", contender } = chosen();
    const wanted = contender.trim().toLowerCase();
    for (const part of document.querySelectorAll("[data-backbone]")) {
      const named = part.dataset.contender === undefined || part.dataset.contender.toLowerCase().includes(wanted);
      part.hidden = (backbone !== "" && part.dataset.backbone !== backbone) || !named;
    }
    for (const part of document.querySelectorAll("[data-task]")) {
      part.hidden = task !== "" && part.dataset.task !== task;
    }
    for (const panel of document.querySelectorAll("[data-tasks]")) {
      const tasks = JSON.parse(panel.dataset.tasks);
      panel.hidden ||= task !== "" && tasks.length > 0 && !tasks.includes(task);
    }
    for (const part of document.querySelectorAll(".panels")) {
      part.hidden ||= !part.querySelector(".panel:not([hidden])");
    }
    const rows = [...document.querySelectorAll(".results > tbody")];
    const shown = rows.filter((row) => !row.hidden).length;
    // what is looked for is not left in a closed fold
    const looking = backbone !== "" || wanted !== "";
    for (const fold of document.querySelectorAll(".fold")) {
      if (looking && fold.querySelector("tbody:not([hidden])")) fold.open = true;
    }
    filters.querySelector("output").value = `${shown} of ${rows.length} rows`;
    for (const [chart, view] of views) if (view && !chart.closest("[hidden]")) apply(chart, view);
    window.dispatchEvent(new Event("resize"));
    draw();
  }

  // --- the answer: one backbone at a time, by one score ---

  const choose = document.querySelector("form.choose");

  function answer() {
    const { of: backbone, by } = choose;
    const here = [...document.querySelectorAll(".answer")].filter((part) => part.dataset.of === backbone.value);
    const scores = [...new Set(here.flatMap((part) => [...part.querySelectorAll(".verdict")].map((one) => one.dataset.by)))];
    const kept = scores.includes(by.value) ? by.value : scores[0];
    by.replaceChildren(...scores.map((name) => new Option(name, name, false, name === kept)));
    by.closest("label").hidden = scores.length < 2;
    for (const part of document.querySelectorAll(".answer")) {
      part.hidden = !here.includes(part);
      for (const one of part.querySelectorAll(".verdict")) one.hidden = one.dataset.by !== kept;
    }
    for (const [chart, view] of views) if (view && chart.closest(".answer:not([hidden])")) apply(chart, view);
    window.dispatchEvent(new Event("resize"));
    draw();
  }

  choose?.addEventListener("input", answer);
  choose?.addEventListener("submit", (event) => event.preventDefault());
  addEventListener("beforeprint", () => { for (const fold of document.querySelectorAll("details.fold")) fold.open = true; });

  function apply(chart, view) {
    if (chart.closest(".answer")) {
      if (choose.by.value) view.signal("task", choose.by.value); // of costs alone there is no score
      view.runAsync();
      return;
    }
    const { task = "", contender } = chosen();
    if (!chart.closest(".memory")) view.signal("wanted", contender.trim().toLowerCase());
    if (chart.closest(".score")) view.signal("task", task || chart.dataset.first);
    view.runAsync();
  }

  filters.addEventListener("input", filter);
  filters.addEventListener("submit", (event) => event.preventDefault());
  filters.addEventListener("reset", () => setTimeout(filter));

  // --- figures ---

  const specs = JSON.parse(document.getElementById("specs")?.textContent ?? "{}");
  const tip = document.createElement("dl");
  tip.className = "tip";
  tip.hidden = true;
  document.body.append(tip);

  function showTip(_, event, item, value) {
    tip.hidden = !value;
    if (!value) return;
    tip.replaceChildren();
    for (const [name, text] of Object.entries(value)) {
      tip.append(Object.assign(document.createElement("dt"), { textContent: name }));
      tip.append(Object.assign(document.createElement("dd"), { textContent: text }));
    }
    tip.style.left = `${Math.min(event.clientX + 14, innerWidth - tip.offsetWidth - 8)}px`;
    tip.style.top = `${Math.min(event.clientY + 14, innerHeight - tip.offsetHeight - 8)}px`;
  }

  const OPTIONS = { mode: "vega", renderer: "svg", actions: false, defaultStyle: false, tooltip: showTip };
  let drawing = Promise.resolve();

  // one after the other, so that a long page stays usable meanwhile
  function draw() {
    for (const chart of document.querySelectorAll(".chart")) {
      if (views.has(chart) || chart.closest("[hidden]")) continue;
      views.set(chart, undefined);
      drawing = drawing
        .then(() => vegaEmbed(chart, specs[chart.id], OPTIONS))
        .then(({ view }) => {
          views.set(chart, view);
          apply(chart, view);
        });
    }
    drawing.then(() => { document.documentElement.dataset.drawn = "yes"; });
  }

  if (choose) answer();
  filter();
})();
