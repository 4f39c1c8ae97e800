// The list of rules: only the rows in view exist.
import { h, state, rate, bits, spark } from "./dom.js";
import { condition, trouble } from "./live.js";

const columns = [
	["name", "Name", (r) => r.name], ["state", "State", trouble], ["in", "Input", (r) => r.in], ["path", "Path", (r) => r.path],
	["pps", "Packets", (r) => r.rates?.packets ?? -1], ["bps", "Bit rate", (r) => r.rates?.bits ?? -1], ["drops", "Dropped", (r) => r.rates?.drops ?? -1],
];
const numbers = new Set(["pps", "bps", "drops"]);

// Search and sorting are kept when the user returns. Rules that need attention come first.
const view = { text: "", state: "", by: "state", down: false, top: 0, at: 0 };

export function rulesPage(live, main) {
	const found = h("p", { class: "dim", role: "status", "aria-live": "polite" });
	const search = h("input", { type: "search", "aria-label": "Search rules by name, address or reason", placeholder: "Search name, address, reason", value: view.text,
		oninput: () => { view.text = search.value; scroll.scrollTop = view.at = 0; update(); } });
	const filters = h("div", { role: "group", "aria-label": "Filter by state", class: "tools" });
	const head = h("div", { class: "head", role: "row" });
	const rows = h("div", { class: "fill", role: "rowgroup" });
	const scroll = h("div", { class: "scroll", onscroll: () => { view.top = scroll.scrollTop; draw(); } }, rows);
	const grid = h("div", { class: "grid", role: "grid", "aria-label": "Rules", "aria-colcount": columns.length + 1, onkeydown: keys },
		h("div", { role: "rowgroup" }, head), scroll);
	main.replaceChildren(h("div", { class: "tools" }, search, filters), found, grid);
	let shown = [], states = "";

	function select() {
		const text = view.text.trim().toLowerCase();
		shown = [];
		const counts = new Map();
		for (const r of live.rules.values()) {
			const is = condition(r);
			counts.set(is, (counts.get(is) ?? 0) + 1);
			if (view.state && is !== view.state) continue;
			if (text && !(r.name + " " + r.in + " " + r.out.join(" ") + " " + r.reason).toLowerCase().includes(text)) continue;
			shown.push(r);
		}
		const value = columns.find((c) => c[0] === view.by)[2];
		const sign = view.down ? -1 : 1;
		shown.sort((a, b) => {
			const x = value(a), y = value(b);
			return sign * (x < y ? -1 : x > y ? 1 : 0) || (a.name < b.name ? -1 : 1);
		});
		const all = [["", "all", live.rules.size], ...[...counts].sort().map(([s, n]) => [s, s.replace("_", " "), n])];
		const now = JSON.stringify([all, view.state]);
		if (now === states) return;
		states = now;
		const focused = filters.contains(document.activeElement) ? document.activeElement.dataset.state : null;
		filters.replaceChildren(...all.map(([s, label, n]) => h("button", { type: "button", "data-state": s, "aria-pressed": String(view.state === s),
			onclick: () => { view.state = s; scroll.scrollTop = view.at = 0; update(); } }, `${label} ${n}`)));
		if (focused !== null) filters.querySelector(`[data-state="${CSS.escape(focused)}"]`)?.focus();
	}

	function heading() {
		const focused = head.contains(document.activeElement) ? document.activeElement.dataset.by : null;
		head.replaceChildren(...columns.map(([id, label]) => h("div", { role: "columnheader", class: numbers.has(id) ? "num" : "",
			"aria-sort": view.by === id ? (view.down ? "descending" : "ascending") : "none" },
			h("button", { type: "button", "data-by": id, onclick: () => {
				view.down = view.by === id ? !view.down : numbers.has(id);
				view.by = id;
				heading();
				update();
			} }, label + (view.by === id ? (view.down ? " ▾" : " ▴") : "")))),
			h("div", { role: "columnheader" }, "Last minutes"));
		if (focused) head.querySelector(`[data-by="${focused}"]`)?.focus();
	}

	const height = () => parseFloat(getComputedStyle(document.documentElement).getPropertyValue("--row"));

	function draw() {
		const rowHeight = height();
		rows.style.height = shown.length * rowHeight + "px";
		const first = Math.max(0, Math.floor(scroll.scrollTop / rowHeight) - 5);
		const last = Math.min(shown.length, Math.ceil((scroll.scrollTop + scroll.clientHeight) / rowHeight) + 5);
		const focused = rows.contains(document.activeElement);
		rows.replaceChildren(...shown.slice(first, last).map((r, i) => {
			const at = first + i;
			const row = h("div", { class: "row", role: "row", "aria-rowindex": at + 2, tabindex: at === view.at ? 0 : -1, "data-at": at, "data-rule": r.name,
				title: r.reason || null, onclick: () => open(r) },
				h("div", { role: "gridcell", class: "c-name" }, h("a", { href: "#/rules/" + encodeURIComponent(r.name), tabindex: -1 }, r.name)),
				h("div", { role: "gridcell", class: "c-state" }, state(condition(r))),
				h("div", { role: "gridcell", class: "c-in" }, r.reason ? h("span", { class: r.state === "failed" ? "bad" : "pending" }, r.reason) : `${r.in} → ${r.out.length}`),
				h("div", { role: "gridcell", class: "c-path" }, r.path || "–"),
				h("div", { role: "gridcell", class: "c-pps num" }, rate(r.rates?.packets)),
				h("div", { role: "gridcell", class: "c-bps num" }, bits(r.rates?.bits)),
				h("div", { role: "gridcell", class: "c-drops num" + (r.rates?.drops > 0 ? " bad" : "") }, rate(r.rates?.drops)),
				h("div", { role: "gridcell", class: "c-spark" }, spark(r.history, r.rates?.packets)));
			row.style.transform = `translateY(${at * rowHeight}px)`;
			return row;
		}));
		if (focused) rows.querySelector(`[data-at="${view.at}"]`)?.focus({ preventScroll: true });
	}

	const open = (r) => { location.hash = "#/rules/" + encodeURIComponent(r.name); };

	function keys(e) {
		const row = e.target.closest?.(".row");
		if (!row) return;
		const page = Math.max(1, Math.floor(scroll.clientHeight / height()) - 1);
		const step = { ArrowDown: 1, ArrowUp: -1, PageDown: page, PageUp: -page, Home: -Infinity, End: Infinity }[e.key];
		if (e.key === "Enter" && shown[view.at]) { e.preventDefault(); open(shown[view.at]); }
		if (step === undefined) return;
		e.preventDefault();
		view.at = Math.min(shown.length - 1, Math.max(0, view.at + step));
		const top = view.at * height();
		if (top < scroll.scrollTop) scroll.scrollTop = top;
		else if (top + height() > scroll.scrollTop + scroll.clientHeight) scroll.scrollTop = top + height() - scroll.clientHeight;
		draw();
		rows.querySelector(`[data-at="${view.at}"]`)?.focus({ preventScroll: true });
	}

	function update() {
		select();
		view.at = Math.max(0, Math.min(view.at, shown.length - 1));
		grid.setAttribute("aria-rowcount", shown.length + 1);
		const text = shown.length === live.rules.size ? `${shown.length} rules` : `${shown.length} of ${live.rules.size} rules`;
		if (found.textContent !== text) found.textContent = text;
		draw();
	}
	heading();
	update();
	scroll.scrollTop = view.top;
	const resize = () => draw();
	addEventListener("resize", resize);
	return { update, leave: () => removeEventListener("resize", resize) };
}
