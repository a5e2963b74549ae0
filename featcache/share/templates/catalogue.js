
"use strict";
const table = document.getElementById("caches");
const caches = [...table.tBodies];
const numeric = new Set(["images", "bytes", "changed"]);
const texts = new Map(caches.map((cache) => [cache, cache.textContent.toLowerCase()]));

document.getElementById("filter").addEventListener("input", (event) => {
  const words = event.target.value.toLowerCase().split(/\s+/).filter(Boolean);
  let shown = 0;
  for (const cache of caches) {
    cache.hidden = !words.every((word) => texts.get(cache).includes(word));
    shown += !cache.hidden;
  }
  document.getElementById("none").hidden = shown > 0;
});

for (const heading of table.tHead.rows[0].cells) {
  heading.firstElementChild.addEventListener("click", () => {
    const key = heading.dataset.key;
    const sign = heading.getAttribute("aria-sort") === "ascending" ? -1 : 1;
    for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
    heading.setAttribute("aria-sort", sign > 0 ? "ascending" : "descending");
    const compare = numeric.has(key)
      ? (a, b) => Number(a.dataset[key]) - Number(b.dataset[key])
      : (a, b) => a.dataset[key].localeCompare(b.dataset[key]);
    table.append(...[...caches].sort((a, b) => sign * compare(a, b)));
  });
}

for (const button of document.querySelectorAll("button.copy")) {
  button.addEventListener("click", async () => {
    const command = button.previousElementSibling;
    try {
      await navigator.clipboard.writeText(command.textContent);
      button.textContent = "copied";
    } catch {
      getSelection().selectAllChildren(command);
    }
  });
}
