"use strict";
(() => {
  const root = document.documentElement;
  const text = (id) => document.getElementById(id).textContent;
  // Base64 of compressed text, as text.
  const unpacked = async (packed) => {
    const bytes = Uint8Array.from(atob(packed), (character) => character.charCodeAt(0));
    return new Response(new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"))).text();
  };
  const specs = JSON.parse(text("plots"));
  const touch = matchMedia("(pointer: coarse)").matches;

  // A figure names its colours as var(--batch-0); plotly wants the colours themselves.
  const paint = (value, css) => {
    if (typeof value === "string") {
      const name = /^var\((--[\w-]+)\)$/.exec(value);
      return name ? css.getPropertyValue(name[1]).trim() : value;
    }
    if (Array.isArray(value)) return value.map((item) => paint(item, css));
    if (value && typeof value === "object") {
      return Object.fromEntries(Object.entries(value).map(([key, item]) => [key, paint(item, css)]));
    }
    return value;
  };

  // The picture to keep has what the page says around the plot: title, legend, names of the axes.
  const save = () => ({
    name: "save", title: "Save as picture", icon: Plotly.Icons.camera,
    click: (plot) => {
      const { title, across, up } = plot.closest("figure").dataset;
      const said = (value) => ({ text: value.replace(/&/g, "&amp;").replace(/</g, "&lt;") });
      const layout = {
        ...plot.layout, width: undefined, height: undefined, autosize: false, showlegend: true,
        title: said(title), margin: { l: 60, r: 20, t: 60, b: 50 },
        paper_bgcolor: getComputedStyle(root).getPropertyValue("--surface").trim(),
        xaxis: { ...plot.layout.xaxis, title: said(across) }, yaxis: { ...plot.layout.yaxis, title: said(up) },
      };
      Plotly.downloadImage({ data: plot.data, layout }, { format: "png", width: 1000, height: 600, scale: 2, filename: plot.id });
    },
  });
  const config = () => ({
    responsive: true, displaylogo: false, displayModeBar: touch ? false : "hover", scrollZoom: false,
    modeBarButtons: [["zoom2d", "pan2d", "resetScale2d"], [save()]],
  });

  const hidden = (plot) => new Set([...plot.closest("figure").querySelectorAll('.keys [aria-pressed="false"]')].map((key) => key.dataset.series));

  const draw = async (plot) => {
    const spec = specs[plot.id];
    const css = getComputedStyle(root);
    const data = paint(spec.data, css);
    const layout = paint(spec.layout, css);
    const off = hidden(plot);
    for (const trace of data) if (off.has(String(trace.meta?.series))) trace.visible = false;
    // On a touch screen a finger that drags over a plot scrolls the page.
    layout.dragmode = touch ? false : "zoom";
    await Plotly.react(plot, data, layout, config());
    // The group's label and the table say what the picture shows; its buttons stay within reach.
    for (const picture of plot.querySelectorAll("svg.main-svg")) picture.setAttribute("aria-hidden", "true");
  };

  const drawAll = async () => {
    delete root.dataset.plots;
    for (const plot of document.querySelectorAll(".chart")) {
      try {
        await draw(plot);
      } catch (error) {
        console.error(error);
        const line = document.createElement("p");
        line.className = "failed";
        line.textContent = `This plot could not be drawn. In words: ${plot.getAttribute("aria-label")}`;
        plot.replaceChildren(line);
      }
      // Between two plots the page may answer to whoever reads it.
      await new Promise((done) => setTimeout(done));
    }
    root.dataset.plots = "drawn";
  };
  const load = async () => {
    if (!("live" in root.dataset)) throw new Error("this browser shows stills");
    const library = document.createElement("script");
    library.textContent = await unpacked(text("plotly"));
    document.head.append(library);
    library.remove();
    if (!window.Plotly) throw new Error("the plots' library did not start");
  };
  let drawing = load().then(drawAll, (error) => {
    console.warn(error.message);
    delete root.dataset.live;
    root.dataset.plots = "stills";
  });
  const redraw = () => {
    if (!("live" in root.dataset)) return;
    delete root.dataset.plots;
    drawing = drawing.then(drawAll);
  };

  for (const key of document.querySelectorAll(".keys button")) {
    key.addEventListener("click", () => {
      const show = key.getAttribute("aria-pressed") === "false";
      key.setAttribute("aria-pressed", String(show));
      for (const plot of key.closest("figure").querySelectorAll(".chart")) {
        const traces = plot.data.flatMap((trace, at) => (String(trace.meta?.series) === key.dataset.series ? [at] : []));
        Plotly.restyle(plot, { visible: show }, traces);
      }
    });
  }

  const system = matchMedia("(prefers-color-scheme: dark)");
  const isDark = () => (root.dataset.theme ? root.dataset.theme === "dark" : system.matches);
  const button = document.getElementById("theme");
  const label = () => { button.textContent = isDark() ? "Light theme" : "Dark theme"; };
  button.hidden = false;
  label();
  button.addEventListener("click", () => {
    root.dataset.theme = isDark() ? "light" : "dark";
    try { localStorage.setItem("batchnorm-theme", root.dataset.theme); } catch { /* a page from disk may keep nothing */ }
    label();
    redraw();
  });
  system.addEventListener("change", () => { label(); redraw(); });

  const copy = document.getElementById("copy");
  if (copy && navigator.clipboard) {
    copy.hidden = false;
    copy.addEventListener("click", async () => {
      try {
        await navigator.clipboard.writeText(document.getElementById("command").textContent);
        copy.textContent = "Copied";
      } catch { copy.textContent = "Select and copy by hand"; }
      setTimeout(() => { copy.textContent = "Copy"; }, 2000);
    });
  }

  // Compressed files are for readers without a script; others get what any program opens.
  for (const packed of "live" in root.dataset ? document.querySelectorAll('a[download$=".csv.gz"]') : []) {
    packed.addEventListener("click", async (event) => {
      event.preventDefault();
      const link = document.createElement("a");
      link.href = URL.createObjectURL(new Blob([await unpacked(packed.href.split(",")[1])], { type: "text/csv" }));
      link.download = packed.download.replace(/\.gz$/, "");
      link.click();
      setTimeout(() => URL.revokeObjectURL(link.href), 60_000);
    });
  }

  // On a narrow screen the table of contents is a button that says where the reader is, and unfolds.
  const contents = document.getElementById("contents");
  const toc = contents.closest(".toc");
  const unfold = (open) => {
    contents.setAttribute("aria-expanded", String(open));
    toc.classList.toggle("open", open);
  };
  contents.hidden = false;
  toc.classList.add("folds");
  contents.addEventListener("click", () => unfold(contents.getAttribute("aria-expanded") === "false"));
  toc.addEventListener("click", (event) => { if (event.target.closest("a")) unfold(false); });
  toc.addEventListener("keydown", (event) => { if (event.key === "Escape") { unfold(false); contents.focus(); } });
  document.addEventListener("click", (event) => { if (!toc.contains(event.target)) unfold(false); });

  // The table of contents follows the reader.
  const links = new Map([...document.querySelectorAll(".toc a")].map((link) => [link.hash.slice(1), link]));
  const sections = [...links.keys()].map((id) => document.getElementById(id));
  let current = null;
  const follow = () => {
    const atEnd = innerHeight + scrollY >= document.body.scrollHeight - 2;
    const passed = sections.filter((section) => section.getBoundingClientRect().top < innerHeight * 0.35);
    const link = links.get((atEnd ? sections.at(-1) : passed.at(-1) ?? sections[0]).id);
    if (link === current) return;
    current?.removeAttribute("aria-current");
    link.setAttribute("aria-current", "location");
    current = link;
    contents.querySelector(".current").textContent = link.textContent;
    // Where the list is longer than the screen, the place stays in sight.
    if (toc.scrollHeight > toc.clientHeight) toc.scrollTo({ top: link.offsetTop - toc.clientHeight / 2 });
  };
  addEventListener("scroll", follow, { passive: true });
  addEventListener("resize", follow, { passive: true });
  follow();

  // What is folded away on the screen is open on paper, but for the numbers behind the plots.
  addEventListener("beforeprint", () => { for (const item of document.querySelectorAll("details:not(.data)")) item.open = true; });
})();
