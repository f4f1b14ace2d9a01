"use strict";
const read = (id) => JSON.parse(document.getElementById(id).textContent);
const config = read("config");
for (const node of document.querySelectorAll("[data-figure]")) {
  const figure = read(node.dataset.figure);
  Plotly.newPlot(node, figure.data, figure.layout, config);
}
// Plotly rejects, without a reason, the promise of an animation that another one interrupts, such as a pause.
window.addEventListener("unhandledrejection", (event) => { if (event.reason === undefined) event.preventDefault(); });
if (document.getElementById("player")) {
  const plot = document.getElementById("player");
  const player = read("player-data");
  const selects = ["agent", "snr", "episode"].map((name) => document.getElementById("choose-" + name));
  let slot = player.first.slot;
  let episode;
  const show = () => {
    document.getElementById("player-now").textContent = episode ? episode.slots[slot - 1] : "";
    if (!player.pictures.length || !episode) return;
    const [number, caption] = episode.pictures[slot - 1];
    document.getElementById("picture-now").src = player.pictures[number];
    document.getElementById("picture-now").alt = "decoded: " + caption;
    document.getElementById("caption-now").textContent = caption;
    document.getElementById("picture-clean").src = player.pictures[episode.clean];
  };
  const choose = () => {
    episode = player.episodes[selects.map((select) => select.value).join("-")];
    document.getElementById("player-title").textContent = episode ? episode.title : "This episode is not here.";
    show();
    return episode ? episode.data : [];
  };
  const jump = (to) => {
    const frame = { duration: 0, redraw: true };
    slot = Math.min(Math.max(to, 1), player.frames.length);
    Plotly.animate(plot, [String(slot)], { mode: "immediate", frame, transition: { duration: 0 } });
  };
  selects[1].value = String(player.first.snr);
  Plotly.newPlot(plot, { data: choose(), layout: player.layout, frames: player.frames, config }).then(() => {
    plot.on("plotly_animatingframe", (event) => { slot = Number(event.name); show(); });
    for (const select of selects) {
      select.addEventListener("change", () => Plotly.react(plot, choose(), plot.layout, config));
    }
    document.getElementById("back").addEventListener("click", () => jump(slot - 1));
    document.getElementById("forward").addEventListener("click", () => jump(slot + 1));
    document.getElementById("player-form").addEventListener("submit", (event) => event.preventDefault());
    jump(slot);
  });
}
