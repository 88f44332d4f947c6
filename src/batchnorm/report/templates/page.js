"use strict";
(() => {
  const root = document.documentElement;
  const specs = JSON.parse(document.getElementById("plots").textContent);
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
  const save = {
    name: "save", title: "Save as picture", icon: Plotly.Icons.camera,
    click: (plot) => {
      const { title, across, up } = plot.closest("figure").dataset;
      const text = (value) => ({ text: value.replace(/&/g, "&amp;").replace(/</g, "&lt;") });
      const layout = {
        ...plot.layout, width: undefined, height: undefined, autosize: false, showlegend: true,
        title: text(title), margin: { l: 60, r: 20, t: 60, b: 50 },
        paper_bgcolor: getComputedStyle(root).getPropertyValue("--surface").trim(),
        xaxis: { ...plot.layout.xaxis, title: text(across) }, yaxis: { ...plot.layout.yaxis, title: text(up) },
      };
      Plotly.downloadImage({ data: plot.data, layout }, { format: "png", width: 1000, height: 600, scale: 2, filename: plot.id });
    },
  };
  const config = {
    responsive: true, displaylogo: false, displayModeBar: touch ? false : "hover", scrollZoom: false,
    modeBarButtons: [["zoom2d", "pan2d", "resetScale2d"], [save]],
  };

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
    await Plotly.react(plot, data, layout, config);
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
  let drawing = drawAll();
  const redraw = () => {
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
    const strip = link.closest("ol");
    if (strip.scrollWidth > strip.clientWidth) strip.scrollTo({ left: link.offsetLeft - strip.clientWidth / 3 });
  };
  addEventListener("scroll", follow, { passive: true });
  addEventListener("resize", follow, { passive: true });
  follow();

  // What is folded away on the screen is open on paper.
  addEventListener("beforeprint", () => { for (const item of document.querySelectorAll("details")) item.open = true; });
})();
