"use strict";
// Draws each figure when it comes near the view, and all of them before the page is printed.
(() => {
  const draw = (node) => {
    if (node.dataset.drawn) return;
    node.dataset.drawn = "yes";
    const { data, layout } = JSON.parse(node.nextElementSibling.textContent);
    Plotly.newPlot(node, data, layout, { displayModeBar: false, responsive: true });
  };
  const nodes = document.querySelectorAll(".plot");
  const watcher = new IntersectionObserver(
    (seen) => seen.filter((entry) => entry.isIntersecting).forEach((entry) => draw(entry.target)),
    { rootMargin: "800px" },
  );
  nodes.forEach((node) => watcher.observe(node));
  addEventListener("beforeprint", () => nodes.forEach(draw));
})();
