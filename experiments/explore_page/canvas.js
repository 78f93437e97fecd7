// The drawing is the component's value: {png, drawn}, or null while there is none.
const canvas = element.querySelector("canvas");
const pen = canvas.getContext("2d", { willReadFrequently: true });
const SIDE = canvas.width;
let last = null; // the pen's position while it is down
let waiting = false;
let own = null; // the value that this script has set

function clear() {
  pen.fillStyle = "black";
  pen.fillRect(0, 0, SIDE, SIDE);
}

function send(value) {
  own = value;
  props.value = value;
  trigger("input");
}

function sendSoon() {
  if (waiting) return;
  waiting = true;
  setTimeout(() => {
    waiting = false;
    send({ png: canvas.toDataURL("image/png"), drawn: true });
  }, 30);
}

function position(event) {
  const box = canvas.getBoundingClientRect();
  return [((event.clientX - box.left) * SIDE) / box.width, ((event.clientY - box.top) * SIDE) / box.height];
}

function line(from, to) {
  pen.strokeStyle = "white";
  pen.lineWidth = SIDE / 13;
  pen.lineCap = "round";
  pen.beginPath();
  pen.moveTo(...from);
  pen.lineTo(...to);
  pen.stroke();
  sendSoon();
}

canvas.addEventListener("pointerdown", (event) => {
  if (event.button !== 0) return;
  canvas.setPointerCapture(event.pointerId);
  last = position(event);
  line(last, last);
});
canvas.addEventListener("pointermove", (event) => {
  if (!last) return;
  const next = position(event);
  line(last, next);
  last = next;
});
for (const end of ["pointerup", "pointercancel"]) {
  canvas.addEventListener(end, () => {
    last = null;
  });
}
element.querySelector("button").addEventListener("click", () => {
  clear();
  send(null);
});
watch("value", () => {
  const value = props.value;
  if (!value || value === own || value.drawn) return;
  const picture = new Image();
  picture.onload = () => {
    pen.imageSmoothingEnabled = false;
    pen.drawImage(picture, 0, 0, SIDE, SIDE);
  };
  picture.src = value.png;
});
clear();
