// The try-out page. Coordinates are px of the upright photo; the browser only ever has reduced pictures of it.
"use strict";

const $ = (id) => document.getElementById(id);
const canvas = $("canvas"), context = canvas.getContext("2d");
const photos = [];  // {name, file, id, width, height, picture, steps, shapes, decided, view, ...}
const settings = { T: 2, threshold: null, theta: null, off: new Set() };  // null: each defect's own
let about = { defects: [], steps: [0] };
let current = null, reading = null, cancelReading = null;
let asked = null;  // the request for proposals that is under way

// ---- the server ----

// The answer to a GET, or with a body, a file or something for JSON, to a POST.
async function ask(path, body, signal) {
  const isFile = body instanceof Blob, type = isFile ? "application/octet-stream" : "application/json";
  const post = { method: "POST", headers: { "Content-Type": type }, body: isFile ? body : JSON.stringify(body) };
  const answer = await fetch(path, { ...(body && post), signal });
  if (answer.ok) return answer;
  const { error, gone } = await answer.json().catch(() => ({ error: `the server answered ${answer.status}` }));
  if (gone && current) readAgain(current);
  throw new Error(error);
}

// What an error is to the user; what was given up on is none.
function sentence(error) {
  if (error.name === "AbortError") return null;
  const isGone = error instanceof TypeError;  // of fetch
  return isGone ? "the server does not answer: is defectcam serve still running, and the file there?" : error.message;
}

async function attempt(what, work) {
  try {
    return await work();
  } catch (error) {
    const text = sentence(error);
    if (text) complain(what ? `${what}: ${text}` : text);
  }
}

function complain(text) {
  $("error").firstElementChild.textContent = text;
  $("error").hidden = !text;
}

// ---- photos ----

function addFiles(files) {
  if (reading?.isSample) cancelReading.abort();  // the user's own photos do not wait for it
  const added = [...files].map((file) => {
    const [, stem, ending] = /^(.*?)(\.[^.]*)?$/s.exec(file.name);
    let name = file.name;
    for (let n = 2; photos.some((photo) => photo.name === name); n++) name = `${stem} (${n})${ending ?? ""}`;
    const photo = { name, file, steps: [], shapes: [], notices: [], decided: new Map(), selected: null, state: "waits" };
    photos.push(photo);
    return photo;
  });
  if (added.length) select(added[0]);
  readNext();
}

function readAgain(photo) {
  Object.assign(photo, { state: "waits", steps: [] });
  readNext();
}

// One photo at a time, that which is looked at before the others.
async function readNext() {
  if (reading) return;
  const photo = current?.state === "waits" ? current : photos.find((one) => one.state === "waits");
  if (!photo) return;
  reading = photo;
  cancelReading = new AbortController();
  Object.assign(photo, { state: "read", error: null, stage: "the photo is read", share: 0, seconds: 0 });
  showPhotos();
  try {
    const answer = await ask("photos", photo.file, cancelReading.signal);
    const lines = answer.body.pipeThrough(new TextDecoderStream()).getReader();
    for (let text = "", part; !(part = await lines.read()).done; ) {
      const whole = (text + part.value).split("\n");
      text = whole.pop();
      for (const line of whole) await told(photo, JSON.parse(line));
    }
    if (photo.state === "read") throw new TypeError("the server has stopped");
  } catch (error) {
    const text = sentence(error);
    Object.assign(photo, { state: text ? "failed" : "cancelled", error: text && `${photo.name}: ${text}` });
    if (photo === current) complain(photo.error);
  }
  reading = null;
  showPhotos();
  readNext();
}

async function told(photo, line) {
  const before = photo.steps.length;
  Object.assign(photo, line);
  if (line.error) throw new Error(line.error);
  if (line.done) photo.state = "done";
  if (line.id && !photo.picture) {
    photo.picture = await load(`photos/${photo.id}/view.jpg?box=0,0,${photo.width},${photo.height}`);
    if (photo === current) fit();
  }
  if (photo === current && photo.steps.length > before) refresh();
  showPhotos();
}

function load(address) {
  return new Promise((resolve, reject) => {
    const image = new Image();
    image.onload = () => resolve(image);
    image.onerror = () => reject(new Error("the picture cannot be shown"));
    image.src = address;
  });
}

function select(photo) {
  current = photo;
  complain(photo.error);
  if (photo.picture && !photo.view) fit();
  showPhotos();
  showList();
  refresh();
}

function showPhotos() {
  $("empty").hidden = photos.length > 0;
  const marks = { waits: "waits", failed: "cannot be read", cancelled: "cancelled", read: "…" };
  for (const photo of photos) {  // their buttons stay, and so does the focus
    photo.button ??= $("photos").appendChild(document.createElement("button"));
    const decided = photo.decided.size ? `${photo.finished ? "✓ " : ""}${photo.decided.size}` : "";
    photo.button.textContent = [photo.name, photo.state === "done" ? decided : marks[photo.state]].filter(Boolean).join(" · ");
    photo.button.title = photo.name;
    photo.button.setAttribute("aria-current", photo === current);
    photo.button.onclick = () => select(photo);
  }
  const { state, stage, share = 0, seconds = 0 } = current ?? {}, busy = state === "read" || state === "waits";
  $("progress").hidden = !busy && state !== "cancelled";
  $("bar").hidden = !busy;
  $("bar").value = share;
  const tells = { waits: "another photo is read first", cancelled: `cancelled after ${seconds} s` };
  $("stage-name").textContent = tells[state] ?? `${stage} · ${Math.round(100 * share)} % · ${seconds.toFixed(0)} s`;
  $("cancel").textContent = busy ? "Cancel" : "Read it";
  showSettings();
}

// ---- settings ----

// The T that is shown: the photo may not have been climbed that far yet.
const shownT = () => Math.max(-1, ...(current?.steps ?? []).filter((T) => T <= settings.T));
const shownDefects = () => about.defects.map((one) => one.name).filter((name) => !settings.off.has(name));

function given() {
  const found = {};
  if (settings.threshold !== null) found.threshold = settings.threshold;
  if (settings.theta !== null) found.cam_threshold = settings.theta;
  if (settings.off.size) found.defects = shownDefects();
  return found;
}

function own(key) {
  const shown = about.defects.filter((one) => !settings.off.has(one.name));
  return [...new Set(shown.map((one) => one[key].toFixed(2)))].join(", ");
}

function showSettings() {
  $("steps").value = about.steps.indexOf(settings.T);
  const wait = current && shownT() >= 0 && shownT() < settings.T ? ` (T = ${shownT()} is shown)` : "";
  $("steps-value").textContent = settings.T + wait;
  $("steps").setAttribute("aria-valuetext", `T = ${settings.T}`);
  for (const [id, key] of [["threshold", "threshold"], ["theta", "cam_threshold"]]) {
    const value = settings[id], first = about.defects[0]?.[key] ?? 0.5;
    $(id).value = value ?? first;
    $(`${id}-value`).textContent = value === null ? `own: ${own(key)}` : value.toFixed(2);
    $(`${id}-value`).className = value === null ? "own" : "";
    $(id).setAttribute("aria-valuetext", $(`${id}-value`).textContent);
  }
  const inQuotes = (text) => text.replaceAll("'", "'\\''");  // of a shell; in a defect's name
  const more = Object.entries(given()), preset = [["iterations", settings.T], ...more].map((pair) => pair.join("=")).join(" ");
  $("line-deploy").value = more.length
    ? `echo '${inQuotes(`AdvCAM tried out | ${preset}`)}' > presets.txt && ./deploy.sh ${about.device} --presets presets.txt`
    : `./deploy.sh ${about.device} --iterations ${settings.T}`;
  const keys = JSON.stringify({ iterations: settings.T, ...given() }).slice(1, -1).replaceAll(/([\\%])/g, "$1$1");
  $("line-request").value = `printf '{"image": "%s", ${inQuotes(keys)}}' "$(base64 -w0 photo.jpg)" > request.json`;
  $("line-cvat").value = `defectcam cvat set-iterations task:12 ${settings.T}`;
}

function changed() {
  showSettings();
  showList();
  refresh();
}

// ---- proposals ----

async function refresh() {
  showHeat();
  draw();
  const photo = current, T = shownT();
  if (!photo || T < 0 || !shownDefects().length) return;
  asked?.abort();
  const mine = asked = new AbortController();
  await attempt("", async () => {
    const answer = await (await ask(`photos/${photo.id}/proposals`, { ...given(), steps: [T] }, mine.signal)).json();
    photo.shapes = answer.proposals[T].filter((shape) => shape.type !== "tag");
    photo.notices = answer.proposals[T].filter((shape) => shape.type === "tag").map((tag) => tag.attributes[0].value);
    photo.fresh = (photo.fresh ?? 0) + 1;  // for tests: how often they were answered
  });
  if (photo === current) showList();
  draw();
}

const confidence = (shape) => Number(shape.attributes.find((one) => one.name === "confidence").value);

// What is decided stays as it was then. Of what is not, the least confidence counts at once, before the server answers.
function rows(photo = current) {
  if (!photo) return [];
  const least = Math.floor(100 * (settings.threshold ?? 0));
  const shown = photo.shapes.filter((shape) => !settings.off.has(shape.label) && confidence(shape) >= least);
  const found = [...photo.decided.values(), ...shown.filter((shape) => !photo.decided.has(shape.key))];
  return found.sort((one, other) => rank(other) - rank(one));
}
const rank = (shape) => (shape.state === "added" ? 101 : confidence(shape)) * shape.area_px;
const undecided = () => rows().filter((shape) => !shape.state);

function showList() {
  const found = rows();
  if (current && !found.some((shape) => shape.key === current.selected)) current.selected = undecided()[0]?.key ?? null;
  $("list").replaceChildren(...found.map((shape, index) => {
    const row = document.createElement("li");
    row.className = `row ${shape.state ?? ""}`;
    row.id = `row-${index}`;
    row.setAttribute("role", "option");
    row.setAttribute("aria-selected", shape.key === current.selected);
    const name = cell(row, "");
    name.className = "name";
    const swatch = name.appendChild(document.createElement("span"));
    swatch.className = "swatch";
    swatch.style.background = colourOf(shape.label);
    cell(name, shape.label);
    cell(name, shape.state ?? "").className = "state";
    cell(row, shape.state === "added" ? "–" : `${confidence(shape)} %`);
    cell(row, shape.area_px.toLocaleString("en"));
    cell(row, `${shape.length_px.toLocaleString("en")} × ${shape.width_px.toLocaleString("en")}`);
    row.onclick = () => { choose(shape.key); $("list").focus(); };
    return row;
  }));
  const chosen = found.findIndex((shape) => shape.key === current?.selected);
  $("list").setAttribute("aria-activedescendant", chosen < 0 ? "" : `row-${chosen}`);
  $("list").children[chosen]?.scrollIntoView({ block: "nearest" });
  const left = undecided().length;
  const took = current?.state === "done" && current.share === 1 ? ` · read in ${current.seconds} s` : "";
  $("count").textContent = current?.steps.length ? `${found.length}, ${left} not decided${took}` : "";
  $("keep").disabled = $("reject").disabled = chosen < 0;
  $("next").disabled = !left;
  $("note").textContent = current?.note ?? current?.notices.join(". ") ?? "";
}

function cell(parent, text) {
  const span = parent.appendChild(document.createElement("span"));
  span.textContent = text;
  return span;
}

function choose(key) {
  current.selected = key;
  showList();
  const shape = rows().find((one) => one.key === key);
  if (shape) bringIntoView(shape);
  draw();
}

function decide(state) {
  const shape = rows().find((one) => one.key === current?.selected);
  if (!shape) return;
  Object.assign(current, { finished: false, note: null, unsaved: true });
  const undone = shape.state === state, isAdded = shape.state === "added";
  if (undone || (isAdded && state === "rejected")) current.decided.delete(shape.key);
  else if (!isAdded) current.decided.set(shape.key, { ...shape, state });
  showPhotos();
  if (undone) choose(shape.key);
  else step(1);
}

// The next proposal that is not decided, or the one before.
function step(direction) {
  const found = rows(), from = found.findIndex((shape) => shape.key === current.selected);
  for (let n = 1; n <= found.length; n++) {
    const shape = found[(from + direction * n + n * found.length) % found.length];
    if (!shape.state) return choose(shape.key);
  }
  showList();
  draw();
}

async function addAt(x, y) {
  if (!current?.id || x < 0 || y < 0 || x > current.width || y > current.height) return;
  const photo = current, defect = $("click-defect").value;
  $("note").textContent = `outlining at ${Math.round(x)}, ${Math.round(y)} …`;
  await attempt("Nothing was added", async () => {
    const defects = defect ? [defect] : shownDefects();
    const body = { x, y, ...given(), defects };
    delete body.threshold;  // a click is about one place, not about how many
    const shape = await (await ask(`photos/${photo.id}/click`, body)).json();
    const key = `added ${Date.now()}`;
    photo.decided.set(key, { ...shape, key, state: "added" });
    Object.assign(photo, { selected: key, finished: false, note: null, unsaved: true });
  });
  showPhotos();
  showList();
  draw();
}

// ---- the picture ----

const colourOf = (label) => about.defects.find((one) => one.name === label)?.colour ?? "#00dc78";
const viewSize = () => [canvas.clientWidth, canvas.clientHeight];

function fit() {
  const [width, height] = viewSize();
  const scale = Math.min(width / current.width, height / current.height) * 0.96;
  current.view = { scale, x: (current.width - width / scale) / 2, y: (current.height - height / scale) / 2 };
  moved();
}

function zoom(factor, px = viewSize()[0] / 2, py = viewSize()[1] / 2) {
  const view = current?.view;
  if (!view) return;
  const least = Math.min(...viewSize().map((side, axis) => side / [current.width, current.height][axis])) / 2;
  const scale = Math.min(Math.max(view.scale * factor, least), 40);
  view.x += px / view.scale - px / scale;
  view.y += py / view.scale - py / scale;
  view.scale = scale;
  moved();
}

function pan(dx, dy) {
  if (!current?.view) return;
  current.view.x += dx / current.view.scale;
  current.view.y += dy / current.view.scale;
  moved();
}

function bringIntoView({ points }) {
  const view = current.view, [width, height] = viewSize();
  if (!view) return;
  const middle = [0, 1].map((axis) => {
    const values = points.filter((_, index) => index % 2 === axis);
    return (Math.min(...values) + Math.max(...values)) / 2;
  });
  const [x, y] = [(middle[0] - view.x) * view.scale, (middle[1] - view.y) * view.scale];
  if (x < 20 || y < 20 || x > width - 20 || y > height - 20) {
    pan(x - width / 2, y - height / 2);
  }
}

// Where the reduced picture is too coarse for the view, the part that is looked at comes in its own pixels.
let moving;
function moved() {
  draw();
  clearTimeout(moving);
  moving = setTimeout(() => {
    const photo = current, view = photo?.view, [width, height] = viewSize();
    if (!photo?.picture || view.scale * devicePixelRatio <= 1.1 * photo.picture.width / photo.width) return;
    if (photo.picture.width >= photo.width) return;
    const box = [view.x, view.y, view.x + width / view.scale, view.y + height / view.scale];
    const [x0, y0] = [Math.max(0, Math.floor(box[0])), Math.max(0, Math.floor(box[1]))];
    const [x1, y1] = [Math.min(photo.width, Math.ceil(box[2])), Math.min(photo.height, Math.ceil(box[3]))];
    if (x1 <= x0 || y1 <= y0) return;
    attempt("", async () => {
      photo.detail = { image: await load(`photos/${photo.id}/view.jpg?box=${x0},${y0},${x1},${y1}`), x0, y0, x1, y1 };
      draw();
    });
  }, 150);
}

async function showHeat() {
  const photo = current, defect = $("heat").value, T = shownT();
  const wanted = photo && defect && T >= 0 ? `photos/${photo.id}/heat.png?defect=${encodeURIComponent(defect)}&steps=${T}` : null;
  if (!photo || photo.heatAddress === wanted) return;
  photo.heatAddress = wanted;
  photo.heat = null;
  if (wanted) await attempt("", async () => { photo.heat = await load(wanted); });
  draw();
}

function pathOf(shape) {
  if (!shape.path) {
    const { points } = shape;
    shape.path = new Path2D();
    for (let index = 0; index < points.length; index += 2) shape.path.lineTo(points[index] + 0.25, points[index + 1] + 0.25);
    shape.path.closePath();
  }
  return shape.path;
}

let drawing = false;
function draw() {
  if (drawing) return;
  drawing = true;
  requestAnimationFrame(() => { drawing = false; drawNow(); });
}

function drawNow() {
  const [width, height] = viewSize(), ratio = devicePixelRatio, photo = current;
  if (canvas.width !== Math.round(width * ratio) || canvas.height !== Math.round(height * ratio)) {
    [canvas.width, canvas.height] = [Math.round(width * ratio), Math.round(height * ratio)];
  }
  context.setTransform(1, 0, 0, 1, 0, 0);
  context.clearRect(0, 0, canvas.width, canvas.height);
  if (!photo?.picture || !photo.view) return;
  const { scale, x, y } = photo.view, px = 1 / scale;
  context.setTransform(scale * ratio, 0, 0, scale * ratio, -x * scale * ratio, -y * scale * ratio);
  context.imageSmoothingEnabled = scale < 3;
  context.drawImage(photo.picture, 0, 0, photo.width, photo.height);
  const part = photo.detail;
  if (part) context.drawImage(part.image, part.x0, part.y0, part.x1 - part.x0, part.y1 - part.y0);
  if (photo.heat) context.drawImage(photo.heat, 0, 0, photo.width, photo.height);
  const shapes = rows(photo), isChosen = (shape) => shape.key === photo.selected;
  const others = photo.heat ? [] : shapes.filter((shape) => !isChosen(shape));  // they would hide the map
  for (const shape of [...others, ...shapes.filter(isChosen)]) {
    const path = pathOf(shape), colour = colourOf(shape.label), chosen = isChosen(shape);
    context.globalAlpha = shape.state === "rejected" ? 0 : shape.state ? 0.45 : 0.22;
    context.fillStyle = colour;
    if (!photo.heat) context.fill(path, "evenodd");
    context.globalAlpha = shape.state === "rejected" ? 0.8 : 1;
    context.lineJoin = "round";
    context.setLineDash(shape.state === "rejected" ? [4 * px, 4 * px] : []);
    if (chosen) stroke(path, "#ffffff", 5.5 * px);
    else stroke(path, "rgb(0 0 0 / .55)", (shape.state ? 4 : 3) * px);
    stroke(path, colour, (chosen || shape.state ? 2.5 : 1.5) * px);
  }
  context.setLineDash([]);
  context.globalAlpha = 1;
  context.setTransform(ratio, 0, 0, ratio, 0, 0);
  if (canvas.matches(":focus-visible")) {
    const cross = new Path2D(`M${width / 2 - 9} ${height / 2}h18M${width / 2} ${height / 2 - 9}v18`);
    stroke(cross, "#000", 4);
    stroke(cross, "#fff", 2);
  }
  canvas.dataset.drawn = `${shapes.length} ${photo.fresh ?? 0}`;
}

function stroke(path, colour, width) {
  context.strokeStyle = colour;
  context.lineWidth = width;
  context.stroke(path);
}

let held = null;  // where the pointer went down
canvas.onpointerdown = (event) => {
  if (event.button) return;
  held = { x: event.offsetX, y: event.offsetY, moved: false };
  canvas.setPointerCapture(event.pointerId);
};
canvas.onpointermove = (event) => {
  if (!held || !current?.view) return;
  held.moved ||= Math.hypot(event.offsetX - held.x, event.offsetY - held.y) > 4;
  if (!held.moved) return;
  pan(held.x - event.offsetX, held.y - event.offsetY);
  [held.x, held.y] = [event.offsetX, event.offsetY];
};
canvas.onpointerup = (event) => {
  const click = held && !held.moved;
  held = null;
  if (!click || !current?.view) return;
  const { scale, x, y } = current.view, at = [x + event.offsetX / scale, y + event.offsetY / scale];
  context.setTransform(1, 0, 0, 1, 0, 0);
  const hits = rows().filter((shape) => shape.state !== "rejected" && context.isPointInPath(pathOf(shape), ...at, "evenodd"));
  const smallest = hits.sort((one, other) => one.area_px - other.area_px)[0];
  if (smallest) choose(smallest.key);
  else addAt(...at);
};
canvas.onpointercancel = () => { held = null; };
canvas.addEventListener("wheel", (event) => {
  event.preventDefault();
  zoom(Math.exp(-event.deltaY * (event.deltaMode ? 0.05 : 0.0015)), event.offsetX, event.offsetY);
}, { passive: false });
canvas.onfocus = canvas.onblur = draw;
new ResizeObserver(() => { if (current?.picture && !current.view) fit(); draw(); }).observe(canvas);

// ---- out of it ----

const decidedAs = (photo, ...states) => [...photo.decided.values()].filter((shape) => states.includes(shape.state));

async function download() {
  await attempt("", async () => {
    const some = photos.filter((photo) => photo.id && photo.decided.size);
    const records = some.map((photo) => ({
      id: photo.id, name: photo.name, width: photo.width, height: photo.height, shapes: decidedAs(photo, "kept", "added"),
    }));
    const answer = await ask(`download/${$("kind").value}`, { photos: records });
    const link = document.createElement("a");
    link.href = URL.createObjectURL(await answer.blob());
    link.download = decodeURIComponent(answer.headers.get("Content-Disposition").split("UTF-8''")[1]);
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 60000);
    for (const photo of some) photo.unsaved = false;
  });
}

async function finish() {
  const photo = current;
  await attempt(photo?.name, async () => {
    if (photo.state !== "done") throw new Error("it is not read to the end yet");
    const left = undecided().length, [off] = settings.off;
    if (off) throw new Error(`${off} is switched off: a finished photo counts for all defects, so switch it on first`);
    if (left) throw new Error(`${left} proposals are not decided: keep or reject them first, or raise the confidence`);
    const body = {
      name: photo.name, shapes: decidedAs(photo, "kept", "added"), rejected: decidedAs(photo, "rejected"),
      settings: { ...given(), iterations: settings.T },
    };
    const { kept } = await (await ask(`photos/${photo.id}/finish`, body)).json();
    const note = `Kept in ${kept}. Nothing else on the photo counts as a defect.`;
    Object.assign(photo, { finished: true, unsaved: false, note });
  });
  showPhotos();
  showList();
}

// ---- what is pressed ----

const keys = {
  k: () => decide("kept"), r: () => decide("rejected"), n: (event) => step(event.shiftKey ? -1 : 1),
  h: () => { $("heat").selectedIndex = ($("heat").selectedIndex + 1) % $("heat").length; showHeat(); },
};
const canvasKeys = {
  "+": () => zoom(1.4), "=": () => zoom(1.4), "-": () => zoom(1 / 1.4), 0: fit,
  a: () => { const { x, y, scale } = current.view, [w, h] = viewSize(); addAt(x + w / 2 / scale, y + h / 2 / scale); },
  arrowleft: () => pan(-60, 0), arrowright: () => pan(60, 0), arrowup: () => pan(0, -60), arrowdown: () => pan(0, 60),
};
document.addEventListener("keydown", (event) => {
  if (!current || event.ctrlKey || event.metaKey || event.altKey || document.querySelector("dialog[open]")) return;
  if (event.target.matches("select")) return;  // a letter there chooses an entry
  const key = event.key.toLowerCase();
  let action = keys[key];
  if (event.target === canvas && current.view) action ??= canvasKeys[key];
  if (event.target === $("list") && ["arrowdown", "arrowup"].includes(key)) {
    action = () => {
      const found = rows(), index = found.findIndex((shape) => shape.key === current.selected) + (key === "arrowdown" ? 1 : -1);
      if (found[index]) choose(found[index].key);
    };
  }
  if (!action) return;
  event.preventDefault();
  action(event);
});

const presses = {
  keep: () => decide("kept"), reject: () => decide("rejected"), next: () => step(1), download, finish,
  "zoom-in": () => zoom(1.4), "zoom-out": () => zoom(1 / 1.4), "zoom-fit": () => current?.picture && fit(),
  reset: () => { Object.assign(settings, { T: ownT(), threshold: null, theta: null }); changed(); },
  cancel: () => {
    if (current.state === "read") return cancelReading.abort();
    if (current.state === "cancelled") return readAgain(current);
    current.state = "cancelled";
    showPhotos();
  },
  "lines-open": () => $("lines").showModal(), "help-open": () => $("help").showModal(),
};
for (const [id, press] of Object.entries(presses)) $(id).onclick = press;
$("error").lastElementChild.onclick = () => complain("");
$("files").onchange = (event) => { addFiles(event.target.files); event.target.value = ""; };
$("steps").oninput = (event) => { settings.T = about.steps[event.target.value]; changed(); };
$("threshold").oninput = (event) => { settings.threshold = Number(event.target.value); changed(); };
$("theta").oninput = (event) => { settings.theta = Number(event.target.value); changed(); };
$("heat").onchange = showHeat;
for (const button of document.querySelectorAll("#lines div button")) {
  button.onclick = async () => {
    button.previousElementSibling.select();
    await navigator.clipboard?.writeText(button.previousElementSibling.value).catch(() => {});
  };
}
document.addEventListener("dragover", (event) => { event.preventDefault(); $("stage").classList.add("drop"); });
document.addEventListener("dragleave", (event) => { if (!event.relatedTarget) $("stage").classList.remove("drop"); });
document.addEventListener("drop", (event) => {
  event.preventDefault();
  $("stage").classList.remove("drop");
  addFiles(event.dataTransfer.files);
});
addEventListener("beforeunload", (event) => { if (photos.some((photo) => photo.unsaved)) event.preventDefault(); });

const ownT = () => about.steps.findLast((T) => T <= about.defects[0].iterations);

attempt("", async () => {
  about = await (await ask("about")).json();
  settings.T = ownT();
  $("theta").min = about.least_theta;
  $("steps").max = about.steps.length - 1;
  for (const T of about.steps) cell($("ticks"), T);
  for (const { name, colour } of about.defects) {
    $("heat").add(new Option(name, name));
    $("click-defect").add(new Option(name, name));
    const label = document.createElement("label"), box = document.createElement("input"), swatch = document.createElement("span");
    Object.assign(box, { type: "checkbox", checked: true, value: name });
    box.onchange = () => { settings.off[box.checked ? "delete" : "add"](name); changed(); };
    swatch.className = "swatch";
    swatch.style.background = colour;
    label.append(box, swatch, name);
    $("defects").append(label);
  }
  $("finish-row").hidden = !about.log_dir;
  $("finish-note").textContent = about.log_dir ? "Reviewed to the end: kept for training" : "";
  showPhotos();
  if (about.sample && !photos.length) {
    addFiles([new File([await (await ask("sample.jpg")).blob()], "sample.jpg")]);
    photos[0].isSample = true;
  }
});
