// What the page does without asking the server: links within it, downloads, pictures, arrow keys in heat maps.
window.qsRemember = (tab, names, values) => {
  const link = new URLSearchParams({tab});
  names.forEach((name, at) => {
    const value = values[at];
    if (value === null || value === undefined) return;
    link.set(name, typeof value === "string" ? value : JSON.stringify(value));
  });
  link.set("run", "1");
  history.replaceState(null, "", "#" + link);
};

// Presses the main button of the tab that the link names, once the tab shows it.
window.qsRun = () => {
  const link = new URLSearchParams(window.location.hash.slice(1));
  if (link.get("run") !== "1") return;
  let tries = 0;
  const press = () => {
    const button = document.getElementById("run-" + link.get("tab"));
    if (button && button.offsetParent !== null) button.click();
    else if (++tries < 100) setTimeout(press, 50);
  };
  // The values that the link gave must have arrived before.
  setTimeout(press, 50);
};
window.addEventListener("hashchange", () => document.getElementById("follow-link")?.click());
// A link that stands in the address already changes nothing there, and is followed all the same.
document.addEventListener("click", event => {
  const link = event.target.closest?.("a[href^='#tab=']");
  if (link && link.hash === window.location.hash) document.getElementById("follow-link")?.click();
});

window.qsSave = packed => {
  const file = JSON.parse(packed);
  const bytes = Uint8Array.from(atob(file.data), character => character.charCodeAt(0));
  qsDownload(new Blob([bytes], {type: file.type}), file.name);
};
window.qsDownload = (blob, name) => {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(blob);
  link.download = name;
  document.body.append(link);
  link.click();
  link.remove();
  setTimeout(() => URL.revokeObjectURL(link.href), 10000);
};

// Draws what an element shows, grounds first and then the text, as the browser has laid it out.
window.qsPicture = (id, name) => {
  const from = document.getElementById(id), box = from?.getBoundingClientRect();
  if (!box || !box.width || !box.height) return;
  const scale = 2, canvas = document.createElement("canvas"), pen = canvas.getContext("2d");
  canvas.width = Math.ceil(box.width * scale);
  canvas.height = Math.ceil(box.height * scale);
  pen.scale(scale, scale);
  pen.translate(-box.left, -box.top);
  pen.fillStyle = getComputedStyle(document.body).backgroundColor;
  pen.fillRect(box.left, box.top, box.width, box.height);
  for (const element of from.querySelectorAll("*")) {
    const ground = getComputedStyle(element).backgroundColor;
    if (ground === "rgba(0, 0, 0, 0)" || element.closest("svg")) continue;
    pen.fillStyle = ground;
    for (const each of element.getClientRects()) pen.fillRect(each.left, each.top, each.width, each.height);
  }
  const texts = document.createTreeWalker(from, NodeFilter.SHOW_TEXT), range = document.createRange();
  for (let node = texts.nextNode(); node; node = texts.nextNode()) {
    if (!node.data.trim() || node.parentElement.closest("svg")) continue;
    const style = getComputedStyle(node.parentElement);
    if (style.visibility === "hidden") continue;
    pen.fillStyle = style.color;
    pen.font = `${style.fontStyle} ${style.fontWeight} ${style.fontSize} ${style.fontFamily}`;
    pen.textBaseline = "middle";
    // A text may be broken over lines: its characters are drawn where the browser has put them.
    let run = "", left = 0, middle = 0;
    const draw = () => { if (run.trim()) pen.fillText(run, left, middle); run = ""; };
    let at = 0;
    for (const character of node.data) {
      range.setStart(node, at);
      range.setEnd(node, at += character.length);
      const rect = range.getBoundingClientRect(), line = rect.top + rect.height / 2;
      if (!rect.width) continue;
      if (run && Math.abs(line - middle) > 1) draw();
      if (!run) { left = rect.left; middle = line; }
      run += character;
    }
    draw();
  }
  const pictures = [...from.querySelectorAll("svg")].map(svg => new Promise(done => {
    const image = new Image(), place = svg.getBoundingClientRect(), copy = svg.cloneNode(true);
    copy.setAttribute("xmlns", "http://www.w3.org/2000/svg");
    copy.setAttribute("width", place.width);
    copy.setAttribute("height", place.height);
    copy.style.color = getComputedStyle(svg).color;
    image.onload = () => { pen.drawImage(image, place.left, place.top, place.width, place.height); done(); };
    image.onerror = done;
    image.src = "data:image/svg+xml;charset=utf-8," + encodeURIComponent(new XMLSerializer().serializeToString(copy));
  }));
  for (const image of from.querySelectorAll("img")) {
    const place = image.getBoundingClientRect();
    pen.drawImage(image, place.left, place.top, place.width, place.height);
  }
  Promise.all(pictures).then(() => canvas.toBlob(blob => qsDownload(blob, name)));
};

// One stop of the tab key for a whole heat map, and arrow keys within it.
document.addEventListener("keydown", event => {
  const token = event.target.closest?.(".qs-token");
  const step = {ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1}[event.key];
  if (!token || !step && event.key !== "Home" && event.key !== "End") return;
  const all = [...token.closest(".qs-map").querySelectorAll(".qs-token")];
  const to = event.key === "Home" ? 0 : event.key === "End" ? all.length - 1 : all.indexOf(token) + step;
  if (!all[to]) return;
  event.preventDefault();
  token.tabIndex = -1;
  all[to].tabIndex = 0;
  all[to].focus();
});
