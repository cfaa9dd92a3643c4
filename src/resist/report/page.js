// Shows the values at the pointer as text. The page is complete without it.
"use strict";
for (const box of document.querySelectorAll(".scroll")) {  // a shade shows it without a script
  if (box.scrollWidth <= box.clientWidth + 1) continue;
  const more = document.createElement("p");
  more.className = "more";
  more.textContent = "The table goes on to the right: scroll it, or use the arrow keys. →";
  box.before(more);
}
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
  const show = (right, down) => {
    data ??= JSON.parse(source.textContent);
    const box = area.getBoundingClientRect();
    tip.textContent = describe(right, down);
    tip.hidden = false;
    tip.style.left = `${Math.max(0, Math.min(box.width - tip.offsetWidth, right * box.width + 12))}px`;
    tip.style.top = `${Math.max(0, Math.min(box.height - tip.offsetHeight, down * box.height + 12))}px`;
  };
  const within = (share) => Math.min(1, Math.max(0, share));
  const point = (event) => {
    const box = area.getBoundingClientRect();
    show(within((event.clientX - box.left) / box.width), within((event.clientY - box.top) / box.height));
  };
  const hide = () => { tip.hidden = true; };
  area.addEventListener("pointermove", point);
  area.addEventListener("pointerdown", point);
  area.addEventListener("pointerleave", hide);
  // The same with the keyboard: the arrow keys move the place.
  let place = [0.5, 0.5];
  const moves = { ArrowLeft: [-0.02, 0], ArrowRight: [0.02, 0], ArrowUp: [0, -0.04], ArrowDown: [0, 0.04] };
  area.tabIndex = 0;
  area.addEventListener("keydown", (event) => {
    if (event.key === "Escape") hide();
    if (!(event.key in moves)) return;
    event.preventDefault();
    place = place.map((share, i) => within(share + moves[event.key][i]));
    show(...place);
  });
  area.addEventListener("blur", hide);
}
