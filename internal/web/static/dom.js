// Elements are only made by calls: no text is parsed as HTML.

// own looks a name up that came from outside: "constructor" is a valid rule name, and is in every object.
export const own = (object, name) => Object.hasOwn(object, name) ? object[name] : undefined;

const svgNS = "http://www.w3.org/2000/svg";

function fill(node, attributes, children) {
	for (const [name, value] of Object.entries(attributes ?? {})) {
		if (value === undefined || value === null || value === false) continue;
		if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
		else node.setAttribute(name, value === true ? "" : String(value));
	}
	node.append(...children.flat(9).filter((c) => c !== null && c !== undefined && c !== false));
	return node;
}

export const h = (tag, attributes, ...children) => fill(document.createElement(tag), attributes, children);
export const svg = (tag, attributes, ...children) => fill(document.createElementNS(svgNS, tag), attributes, children);

const prefixes = ["", "k", "M", "G", "T", "P"];

function scaled(v) {
	let i = 0;
	while (v >= 999.5 && i < prefixes.length - 1) { v /= 1000; i++; }
	const digits = i === 0 ? 0 : v < 9.995 ? 2 : v < 99.95 ? 1 : 0;
	return [v.toFixed(digits), prefixes[i]];
}

export function count(n) {
	if (n < 100000) return String(Math.round(n));
	const [v, p] = scaled(n);
	return v + p;
}

export function rate(n, unit = "/s") {
	if (n === null || n === undefined) return "–";
	if (n > 0 && n < 9.5) return n.toFixed(1) + unit;
	const [v, p] = scaled(n);
	return v + p + unit;
}

export function bits(n) {
	if (n === null || n === undefined) return "–";
	const [v, p] = scaled(n);
	return v + " " + p + "bit/s";
}

export function bytes(n) {
	const [v, p] = scaled(n);
	return v + " " + p + "B";
}

// now is the daemon's time (Live.now): the browser's clock may be wrong.
export function ago(when, now) {
	if (!when) return "never";
	const s = Math.max(0, Math.floor((now - new Date(when).getTime()) / 1000));
	if (s < 60) return s + " s ago";
	if (s < 3600) return Math.floor(s / 60) + " min ago";
	if (s < 86400) return Math.floor(s / 3600) + " h ago";
	return Math.floor(s / 86400) + " d ago";
}

export const state = (s) => h("span", { class: "state " + s }, s.replace("_", " "));

// lost are the drops that an output lacks: packets delivered by another input of the rule do not
// count.
export const lost = (drops) => (drops ?? []).filter((d) => d.packets > 0 && d.reason !== "duplicate" && d.reason !== "standby");

export const sum = (drops) => lost(drops).reduce((n, d) => n + d.packets, 0);

const points = 60;

// spark draws the rates of the last minutes, with the current one at its right end.
export function spark(history, now) {
	const values = [...history, ...(now === undefined || now === null ? [] : [now])].slice(-points - 1);
	const top = Math.max(1e-9, ...values);
	const line = values.map((v, i) => `${(120 * (points - values.length + 1 + i) / points).toFixed(1)},${(22 - 20 * v / top).toFixed(1)}`).join(" ");
	return svg("svg", { class: "spark", viewBox: "0 0 120 24", "aria-hidden": "true" }, values.length > 1 && svg("polyline", { points: line }));
}
