// Shows the values at the pointer as text. The page is complete without it.
"use strict";
for (const frame of document.querySelectorAll(".frame")) {
  const source = frame.querySelector("script[type='application/json']");
  const area = frame.querySelector(".area");
  const tip = frame.querySelector(".tip");
  if (!source) continue;
  let data = null;
  const number = (value) => (Math.abs(value) >= 1000 ? Math.round(value).toLocaleString("en") : String(+value.toPrecision(4)));
  const nearest = (values, wanted) => {
    let best = 0;
    for (let i = 1; i < values.length; i++) {
      if (Math.abs(values[i] - wanted) < Math.abs(values[best] - wanted)) best = i;
    }
    return best;
  };
  const describe = (right, down) => {
    if (data.type === "lines") {
      const [low, high] = data.x;
      const x = data.log ? low * (high / low) ** right : low + (high - low) * right;
      const lines = data.series.map((line) => {
        const i = nearest(line.x, x);
        return `${line.name}: ${number(line.y[i])} at ${number(line.x[i])}`;
      });
      return lines.slice(0, 12).join("\n");
    }
    const column = Math.min(data.x.length - 1, Math.floor(right * data.x.length));
    if (data.type === "steps") {
      return [`${data.label} ${number(data.x[column])}`, ...data.series.map((line) => `${line.name}: ${number(line.y[column])}`)].join("\n");
    }
    const block = Math.min(data.blocks - 1, Math.floor(down * data.blocks));
    const holders = data.combinations[data.cells[column][block]];
    return `round ${data.x[column]}, block ${block}\n` + (holders.length > 1 ? "workers " : "worker ") + holders.join(", ");
  };
  const show = (event) => {
    data ??= JSON.parse(source.textContent);
    const box = area.getBoundingClientRect();
    const right = Math.min(1, Math.max(0, (event.clientX - box.left) / box.width));
    const down = Math.min(1, Math.max(0, (event.clientY - box.top) / box.height));
    tip.textContent = describe(right, down);
    tip.hidden = false;
    tip.style.left = `${Math.max(0, Math.min(box.width - tip.offsetWidth, right * box.width + 12))}px`;
    tip.style.top = `${Math.max(0, Math.min(box.height - tip.offsetHeight, down * box.height + 12))}px`;
  };
  area.addEventListener("pointermove", show);
  area.addEventListener("pointerdown", show);
  area.addEventListener("pointerleave", () => { tip.hidden = true; });
}
