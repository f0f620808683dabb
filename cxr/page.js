// The sliders of report.html. The functions from sum() to formatInterval() do the same as those of
// cxr/proportions.py, in the same order, so that all digits are equal. A value with its 95 % interval
// is an object {value, low, high}.
"use strict";

const data = JSON.parse(document.getElementById("slider-data").textContent);
const byId = (id) => document.getElementById(id);
let threshold = data.threshold;

function sum(numbers) {
  return numbers.reduce((total, number) => total + number, 0);
}

// Computes the share of correct images with Wilson's interval. correct: 0 or 1 for each image.
function wilsonInterval(correct, patients) {
  const p = sum(correct) / correct.length;
  const z2 = (data.z * data.z) / effectiveSampleSize(correct, patients);
  const middle = p + z2 / 2;
  const margin = Math.sqrt(z2 * p * (1 - p) + (z2 * z2) / 4);
  const low = (middle - margin) / (1 + z2);
  const high = (middle + margin) / (1 + z2);
  return { value: p, low: Math.min(low, p), high: Math.max(high, p) };
}

// Returns how many independent images carry as much information as these correlated ones.
function effectiveSampleSize(correct, patients) {
  const n = correct.length;
  const p = sum(correct) / n;
  const residualSums = new Map(); // one for each patient
  correct.forEach((one, i) => {
    residualSums.set(patients[i], (residualSums.get(patients[i]) ?? 0) + (one - p));
  });
  const nPatients = residualSums.size;
  const variance = (p * (1 - p)) / n; // if all images were independent
  if (variance === 0 || nPatients === 1 || nPatients === n) return nPatients;
  const squares = [...residualSums.values()].map((residual) => residual * residual);
  const clusteredVariance = ((nPatients / (nPatients - 1)) * sum(squares)) / (n * n);
  return n / Math.max(1, clusteredVariance / variance);
}

// Computes the ratio of two proportions with its interval by MOVER (Donner and Zou 2012).
function ratioInterval(top, bottom) {
  const a = top.value;
  const b = bottom.value;
  function terms(aLimit, bLimit) {
    const x = aLimit * (2 * a - aLimit);
    const y = bLimit * (2 * b - bLimit);
    return { x, y, root: a * b + Math.sqrt(Math.max(a * b * (a * b) - x * y, 0)) };
  }
  const lower = terms(top.low, bottom.high);
  const upper = terms(top.high, bottom.low);
  return {
    value: a / b, // infinite if only b is 0, NaN if both are 0
    low: lower.root ? lower.x / lower.root : 0,
    high: upper.y > 0 ? upper.root / upper.y : Infinity,
  };
}

function complement(share) {
  return { value: 1 - share.value, low: 1 - share.high, high: 1 - share.low };
}

// Returns the probability after a test from the odds before it.
function probabilityAfter(odds, ratio) {
  const after = (limit) => 1 - 1 / (1 + odds * limit);
  return { value: after(ratio.value), low: after(ratio.low), high: after(ratio.high) };
}

// Computes PPV and NPV for another share of positive images.
function predictiveValues(sensitivity, specificity, prevalence) {
  const odds = prevalence / (1 - prevalence);
  const positiveRatio = ratioInterval(sensitivity, complement(specificity));
  const negativeRatio = ratioInterval(complement(sensitivity), specificity);
  return {
    ppv: probabilityAfter(odds, positiveRatio),
    npv: complement(probabilityAfter(odds, negativeRatio)),
  };
}

// Formats a number with three decimals. A small positive number is never shown as 0.
function formatNumber(value) {
  if (value > 0 && value < 0.0005) return "<0.001";
  // Only odd sixteenths lie exactly between two results: Python then takes the even digit, and
  // toFixed the larger number.
  const isRoundedUp = (value * 16) % 4 === 1;
  return (isRoundedUp ? value - 0.0001 : value).toFixed(3);
}

function formatInterval({ value, low, high }) {
  if (Number.isNaN(value)) return "undefined";
  return `${formatNumber(value)} (${formatNumber(low)} to ${formatNumber(high)})`;
}

// ---------------------------------------------------------------- threshold and prevalence

// Computes all scores at a threshold, for a share of positive images.
function computeScores(threshold, prevalence) {
  // In float32, as evaluate.py compares.
  const isPositive = data.probabilities.map((p) => Math.fround(p) > Math.fround(threshold));
  const ofClass = (label) => {
    const rows = data.labels.flatMap((other, i) => (other === label ? [i] : []));
    const correct = rows.map((i) => Number(isPositive[i] === (label === 1)));
    const interval = wilsonInterval(correct, rows.map((i) => data.patients[i]));
    return { correct: sum(correct), n: rows.length, interval };
  };
  const [negative, positive] = [ofClass(0), ofClass(1)];
  return {
    negative,
    positive,
    sensitivity: positive.interval,
    specificity: negative.interval,
    ...predictiveValues(positive.interval, negative.interval, prevalence),
  };
}

// Returns the prevalence of a position of the slider: 0.1 % to 0.9 %, then 1 % to 99 %.
function prevalenceAt(position) {
  return position < 10 ? position / 1000 : (position - 9) / 100;
}

const formatCount = (count) => count.toLocaleString("en"); // 1,000

function countImages({ correct, n }, name) {
  const [right, all, wrong] = [correct, n, n - correct].map(formatCount);
  return `${right} of ${all} ${name} images correct, ${wrong} wrong`;
}

// Says how many of 1,000 patients would get which result.
function countPatients(scores, prevalence) {
  const ill = Math.round(1000 * prevalence);
  const found = Math.round(ill * scores.sensitivity.value);
  const alarms = Math.round((1000 - ill) * (1 - scores.specificity.value));
  const results = found + alarms;
  const negative = [1000 - results, 1000 - ill - alarms].map(formatCount);
  return {
    ppv: `${formatCount(results)} of 1,000 patients positive, ${found} correctly`,
    npv: `${negative[0]} of 1,000 patients negative, ${negative[1]} correctly`,
  };
}

function update() {
  const prevalence = prevalenceAt(byId("prevalence").valueAsNumber);
  const scores = computeScores(threshold, prevalence);
  for (const name of ["sensitivity", "specificity", "ppv", "npv"]) {
    byId(name).textContent = formatInterval(scores[name]);
  }
  byId("sensitivity-counts").textContent = countImages(scores.positive, data.classes[1]);
  byId("specificity-counts").textContent = countImages(scores.negative, data.classes[0]);
  const patients = countPatients(scores, prevalence);
  byId("ppv-counts").textContent = patients.ppv;
  byId("npv-counts").textContent = patients.npv;

  const isModels = threshold === data.threshold;
  showText("threshold", isModels ? data.threshold_text : threshold.toFixed(3));
  showText("prevalence", `${Number((100 * prevalence).toFixed(1))} %`);
  const point = byId("chosen-point");
  point.setAttribute("cx", `${100 * (1 - scores.specificity.value)}%`);
  point.setAttribute("cy", `${100 * (1 - scores.sensitivity.value)}%`);
  const line = byId("chosen-threshold");
  line.setAttribute("x1", `${100 * threshold}%`);
  line.setAttribute("x2", `${100 * threshold}%`);
}

// Shows the value of a slider as text, also to a screen reader.
function showText(id, text) {
  byId(`${id}-text`).textContent = text;
  byId(id).setAttribute("aria-valuetext", text);
}

function reset() {
  threshold = data.threshold; // the slider shows the nearest of its steps
  byId("threshold").value = threshold;
  byId("prevalence").value = data.position;
  update();
}

byId("threshold").addEventListener("input", () => {
  threshold = byId("threshold").valueAsNumber;
  update();
});
byId("prevalence").addEventListener("input", update);
byId("reset").addEventListener("click", reset);
byId("sliders").hidden = false;
document.body.classList.add("has-sliders"); // hides the table
reset();
