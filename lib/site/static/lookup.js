// The table and chart of lookup.html: rows of LOOKUP are filtered, sorted and drawn; the address holds the view.
(() => {
  const { columns, rows: packed, texts, views } = window.LOOKUP;
  const unpacked = (name, value) => (value === null || !texts[name] ? value : texts[name][value]);
  const rows = packed.map((values) => Object.fromEntries(columns.map((name, place) => [name, unpacked(name, values[place])])));
  const byId = (id) => document.getElementById(id);
  const FILTERS = ["kind", "what", "at", "profile", "device"]; // each offers what those before it leave
  const MOST = 500; // rows of a table that a browser shows at once
  const START = window.LOOKUP.start;
  let view = { ...START };
  let chart = null;

  const atOf = (row) => (row.at === null ? "" : `${row.at.toLocaleString("en")} ${row.at_unit}`);
  const valueOf = (row, name) => (name === "at" ? atOf(row) : row[name]);

  function number(value) {
    if (value === null) return "–";
    if (Math.abs(value) >= 1000) return Math.round(value).toLocaleString("en");
    return String(Number(value.toPrecision(3)));
  }
  const span = (low, high) => (low === null ? "" : ` [${low.toFixed(3)}, ${high.toFixed(3)}]`);
  const ratioOf = (row) => (row.ratio === null ? "–" : row.ratio.toFixed(3) + span(row.ratio_low, row.ratio_high));
  const rangeOf = (row) =>
    row.low === null ? "" : `${row.range_of} from ${number(row.low)} to ${number(row.high)} ${row.unit}`;
  const saidOf = (row) => row.why || [row.verdict, row.certified === false ? "fails its certificate" : null, row.note]
    .filter((said, place, all) => said && all.indexOf(said) === place).join("; ") || "–";
  const COLUMNS = [ // title, what it sorts by, what it shows, the filter that says it for all rows where it is set
    ["variant", (row) => row.variant.toLowerCase(), (row) => row.variant],
    ["what", (row) => row.what, (row) => row.what, "what"],
    ["at", (row) => row.at, atOf, "at"],
    ["measured", (row) => row.value, (row) => (row.value === null ? "–" : `${number(row.value)} ${row.unit}`)],
    ["÷ SDPA", (row) => row.ratio, ratioOf],
    ["n", (row) => row.n, (row) => (row.n === null ? "–" : String(row.n))],
    ["verdict, or why there is no number", saidOf, saidOf],
    ["records", (row) => row.profile, null],
    ["device", (row) => row.device, (row) => row.device, "device"],
  ];

  function read() {
    const given = Object.fromEntries(new URLSearchParams(location.hash.slice(1)));
    if (!["ratio", "value"].includes(given.show)) delete given.show;
    view = { show: "ratio", sort: "÷ SDPA", order: "ascending", ...given };
  }
  function write() {
    const kept = Object.entries(view).filter(([, value]) => value !== "");
    const hash = `#${new URLSearchParams(kept)}`;
    byId("lookup-link").href = hash;
    if (!isView() && location.hash) return; // a reader is at a heading
    history.replaceState(null, "", hash);
  }

  const keeps = (row, names) => names.every((name) => !view[name] || valueOf(row, name) === view[name]);
  function found() {
    const either = (view.text || "").toLowerCase().split(",").map((part) => part.split(/\s+/).filter(Boolean));
    const wanted = either.filter((part) => part.length);
    const text = (row) => `${row.variant} ${row.label} ${row.what} ${row.setting || ""}`.toLowerCase();
    return rows.filter((row) => keeps(row, FILTERS) && (!wanted.length || wanted.some((part) => part.every((word) => text(row).includes(word)))));
  }

  function offer() {
    FILTERS.forEach((name, place) => {
      const offered = new Map();
      rows.filter((row) => keeps(row, FILTERS.slice(0, place))).forEach((row) => offered.set(valueOf(row, name), row.at));
      const values = [...offered.keys()].filter((value) => value !== "" && value !== null);
      values.sort((a, b) => (name === "at" ? offered.get(a) - offered.get(b) : a < b ? -1 : 1));
      if (view[name] && !values.includes(view[name])) view[name] = "";
      const select = byId(`lookup-${name}`);
      select.replaceChildren(new Option("all", ""), ...values.map((value) => new Option(value, value)));
      select.value = view[name] || "";
    });
    byId("lookup-text").value = view.text || "";
    byId("lookup-show").value = view.show;
  }

  function sorted(some) {
    const by = (COLUMNS.find(([title]) => title === view.sort) || COLUMNS[0])[1];
    const sign = view.order === "descending" ? -1 : 1;
    return [...some].sort((a, b) => {
      const [one, other] = [by(a), by(b)];
      if (one === null || other === null) return (one === null) - (other === null); // what is missing stands last
      return sign * (one < other ? -1 : one > other ? 1 : 0);
    });
  }

  function element(name, content, attributes = {}) {
    const made = document.createElement(name);
    Object.entries(attributes).forEach(([key, value]) => made.setAttribute(key, value));
    made.append(...[content].flat());
    return made;
  }
  const pathOf = (path) => `records/${path.split("/").map(encodeURIComponent).join("/")}`;
  const link = (path, text) => element("a", text, { href: pathOf(path) });
  function recordsOf(row) {
    const [first, ...more] = row.records;
    if (!first) return [row.profile];
    if (!more.length) return [link(first, row.profile)];
    const list = element("ul", row.records.map((path) => element("li", link(path, path.split("/").pop()))));
    return [element("details", [element("summary", `${row.profile}: ${row.records.length}`), list])];
  }
  function nameOf(row) {
    return window.LOOKUP.pages.includes(row.label)
      ? [element("a", row.variant, { href: `variants/${row.label}.html` })] : [row.variant];
  }

  function tabulate(some) {
    const shownColumns = COLUMNS.filter(([, , , filter]) => !filter || !view[filter]);
    byId("lookup-head").replaceChildren(...shownColumns.map(([title]) => {
      const isSorted = title === view.sort;
      const button = element("button", title, { type: "button" });
      button.addEventListener("click", () => {
        view.order = isSorted && view.order === "ascending" ? "descending" : "ascending";
        view.sort = title;
        draw();
        [...byId("lookup-head").querySelectorAll("button")].find((one) => one.textContent === title).focus();
      });
      return element("th", button, { scope: "col", "aria-sort": isSorted ? view.order : "none" });
    }));
    byId("lookup-body").replaceChildren(...sorted(some).slice(0, MOST).map((row) => {
      const cells = shownColumns.map(([title, , shown]) => {
        const content = title === "records" ? recordsOf(row) : title === "variant" ? nameOf(row) : [shown(row)];
        const tips = { measured: rangeOf(row), variant: row.setting || "" };
        return element("td", content, tips[title] ? { title: tips[title] } : {});
      });
      const made = element("tr", cells);
      if (row.certified === false) made.className = "uncertified";
      return made;
    }));
    const count = `${some.length.toLocaleString("en")} of ${rows.length.toLocaleString("en")} rows`;
    byId("lookup-count").textContent = some.length > MOST ? `${count}; the first ${MOST} are shown: filter them` : count;
  }

  function colours() {
    const of = getComputedStyle(document.documentElement);
    const ink = of.getPropertyValue("--pst-color-text-base").trim() || "#222";
    const faint = of.getPropertyValue("--pst-color-border").trim() || "#ccc";
    const axis = { labelColor: ink, titleColor: ink, gridColor: faint, domainColor: ink, tickColor: ink };
    return { background: "transparent", axis, legend: { labelColor: ink, titleColor: ink }, title: { color: ink } };
  }

  function plotted(some) {
    const isRatio = view.show === "ratio";
    return some.map((row) => ({
      ...row,
      x: isRatio ? (row.ratio === null && row.label === window.LOOKUP.reference && row.value !== null ? 1 : row.ratio) : row.value,
      low: isRatio ? row.ratio_low : row.low, high: isRatio ? row.ratio_high : row.high,
      at_text: atOf(row), measured: row.value === null ? "–" : `${number(row.value)} ${row.unit}`,
      beside: ratioOf(row), n: row.n === null ? "–" : row.n, said: saidOf(row),
      certificate: row.certified === false ? "failed" : row.certified ? "passed" : "not of these records",
      record: row.records[0] ? pathOf(row.records[0]) : null,
    })).filter((row) => row.x !== null);
  }

  async function plot(some) {
    const points = plotted(some);
    const measures = new Set(points.map((row) => row.what)), studies = new Set(points.map((row) => 
      [row.profile, row.kind === "small tasks" ? "" : row.setting, row.device, row.at].join()));
    const said = byId("lookup-said"), where = byId("lookup-chart");
    if (chart) { chart.finalize(); chart = null; }
    where.replaceChildren();
    if (!points.length || measures.size > 1) {
      said.textContent = points.length
        ? "Pick one \u201cwhat\u201d to draw it: numbers of different things share no axis."
        : !some.length ? "No row fits all filters: \u201cshow all\u201d drops them."
          : some.every((row) => row.value === null) ? "Nothing of this was measured; the table says why."
            : "None of these stands beside SDPA: draw the measured number instead.";
      return;
    }
    const lengths = new Set(points.map((row) => row.at));
    const overLengths = lengths.size > 1 && new Set(points.map((row) => row.profile)).size === 1;
    const what = [...measures][0];
    const axis = view.show === "ratio" ? `${what} ÷ SDPA's` : `${what}, ${points[0].unit}`;
    said.textContent = studies.size > 1 && !overLengths
      ? "Several studies or lengths are drawn together: each dot's tooltip says which it is of. Pick one to compare."
      : "";
    const spec = structuredClone(views[overLengths ? "lines" : "dots"]);
    spec.datasets = { rows: points };
    if (points.some((row) => row.x <= 0)) { // which a logarithm has no place for
      spec.layer.forEach((layer) => ["x", "y"].forEach((axis) => {
        if (layer.encoding[axis]?.field === "x") layer.encoding[axis].scale = { type: "linear", padding: 20 };
      }));
      spec.layer.forEach((layer) => { delete layer.transform; });
    }
    spec.title = axis;
    spec.config = { ...spec.config, ...colours() };
    const made = await window.vegaEmbed(where, spec, { actions: { export: true, source: false, compiled: false, editor: false }, renderer: "svg", logLevel: 1, tooltip: { theme: document.documentElement.dataset.theme } });
    chart = made;
    where.querySelector("summary")?.setAttribute("aria-label", "save the chart");
    where.querySelector("svg")?.setAttribute("aria-label", `${axis}: ${sorted(some).slice(0, 12).map((row) => `${row.variant} ${view.show === "ratio" ? ratioOf(row) : number(row.value)}`).join("; ")}`);
  }

  let turn = Promise.resolve();
  function draw() {
    offer();
    write();
    const some = found();
    tabulate(some);
    turn = turn.then(() => plot(some));
    window.lookupDrawn = turn;
  }

  FILTERS.forEach((name) => byId(`lookup-${name}`).addEventListener("change", (event) => { view[name] = event.target.value; draw(); }));
  byId("lookup-show").addEventListener("change", (event) => { view.show = event.target.value; draw(); });
  byId("lookup-text").addEventListener("input", (event) => { view.text = event.target.value; draw(); });
  byId("lookup-all").addEventListener("click", () => { view = { show: view.show, sort: view.sort, order: view.order }; draw(); });
  const isView = () => location.hash.includes("="); // else the hash is a heading's
  window.addEventListener("hashchange", () => { if (isView()) { read(); draw(); } });
  new MutationObserver(() => draw()).observe(document.documentElement, { attributes: true, attributeFilter: ["data-theme"] });
  if (isView()) read();
  draw();
})();
