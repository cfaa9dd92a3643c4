// What lies under the pointer, in words. The page is whole without this.
"use strict";
for (const frame of document.querySelectorAll(".frame")) {
  const source = frame.querySelector("script[type='application/json']");
  const area = frame.querySelector(".area");
  const tip = frame.querySelector(".tip");
  if (!source) continue;
  let facts = null;
  const number = (value) => (Math.abs(value) >= 1000 ? Math.round(value).toLocaleString("en") : String(+value.toPrecision(4)));
  const nearest = (values, wanted) => {
    let best = 0;
    for (let i = 1; i < values.length; i++) {
      if (Math.abs(values[i] - wanted) < Math.abs(values[best] - wanted)) best = i;
    }
    return best;
  };
  const words = (right, down) => {
    if (facts.kind === "lines") {
      const [low, high] = facts.x;
      const x = facts.log ? low * (high / low) ** right : low + (high - low) * right;
      const lines = facts.series.map((one) => {
        const i = nearest(one.x, x);
        return `${one.name}: ${number(one.y[i])} at ${number(one.x[i])}`;
      });
      return lines.slice(0, 12).join("\n");
    }
    const column = Math.min(facts.x.length - 1, Math.floor(right * facts.x.length));
    if (facts.kind === "steps") {
      return [`${facts.label} ${number(facts.x[column])}`, ...facts.series.map((one) => `${one.name}: ${number(one.y[column])}`)].join("\n");
    }
    const block = Math.min(facts.blocks - 1, Math.floor(down * facts.blocks));
    const holders = facts.combinations[facts.cells[column][block]];
    return `round ${facts.x[column]}, block ${block}\n` + (holders.length > 1 ? "workers " : "worker ") + holders.join(", ");
  };
  const show = (event) => {
    facts ??= JSON.parse(source.textContent);
    const box = area.getBoundingClientRect();
    const right = Math.min(1, Math.max(0, (event.clientX - box.left) / box.width));
    const down = Math.min(1, Math.max(0, (event.clientY - box.top) / box.height));
    tip.textContent = words(right, down);
    tip.hidden = false;
    tip.style.left = `${Math.max(0, Math.min(box.width - tip.offsetWidth, right * box.width + 12))}px`;
    tip.style.top = `${Math.max(0, Math.min(box.height - tip.offsetHeight, down * box.height + 12))}px`;
  };
  area.addEventListener("pointermove", show);
  area.addEventListener("pointerdown", show);
  area.addEventListener("pointerleave", () => { tip.hidden = true; });
}
