// The page: its header, and the section shown.
import { h, own, state, rate, bits, count, ago, sum } from "./dom.js";
import { Live, condition } from "./live.js";
import { ask, token, setToken } from "./api.js";
import { rulesPage } from "./rules.js";
import { rulePage } from "./rule.js";
import { eventsPage } from "./events.js";
import { editPage, filePage, unlock } from "./edit.js";
import { historyPage, PendingChange } from "./changes.js";

const live = new Live();
const main = document.getElementById("main");
const pending = new PendingChange(live, document.getElementById("pending"));
let section = null, writable = false;

const words = { connecting: "connecting", live: "live", polling: "live, by polling", gone: "the daemon does not answer" };

live.addEventListener("connection", () => {
	const at = document.getElementById("connection");
	at.textContent = words[live.connection];
	at.className = live.connection === "polling" ? "live" : live.connection;
});

live.addEventListener("change", () => {
	totals();
	pending.update();
	section?.update();
});

function totals() {
	const s = live.status;
	const all = { packets: 0, bits: 0, sent: 0, drops: 0, dropping: 0, silent: 0 };
	let known = false;
	for (const r of live.rules.values()) {
		const is = condition(r);
		if (is in all) all[is]++;
		if (!r.rates) continue;
		known = true;
		all.packets += r.rates.packets; all.bits += r.rates.bits; all.sent += r.rates.sent; all.drops += r.rates.drops;
	}
	const items = [["Rules", s.rules], ["active", s.active, "active"], ["pending", s.pending, s.pending ? "pending" : ""], ["failed", s.failed, s.failed ? "failed" : ""],
		all.dropping && ["dropping", all.dropping, "dropping"], all.silent && ["silent", all.silent, "silent"],
		["In", known ? `${rate(all.packets)}, ${bits(all.bits)}` : "–"], ["Out", known ? rate(all.sent) : "–"], ["Dropped", known ? rate(all.drops) : "–", all.drops > 0 ? "bad" : ""], ["Version", s.version], ["Started", ago(s.started, live.now)]].filter(Boolean);
	document.getElementById("totals").replaceChildren(...items.map(([k, v, kind]) => h("div", {}, h("dt", {}, k), h("dd", { class: kind ?? "" }, v))));
	const warnings = document.getElementById("warnings");
	warnings.hidden = s.warnings.length === 0;
	const text = s.warnings.join("\n");
	if (warnings.dataset.text !== text) {
		warnings.dataset.text = text;
		warnings.replaceChildren(...s.warnings.map((w) => h("li", {}, w)));
	}
}

function table(caption, titles, rows) {
	return h("div", { class: "wide" }, h("table", {}, h("caption", {}, caption), h("thead", {}, h("tr", {}, titles.map((t) => h("th", { scope: "col" }, t)))),
		h("tbody", {}, rows.map((r) => h("tr", {}, r.map((c) => h("td", {}, c)))))));
}

function interfacesPage(_, into) {
	const querier = (m) => !m ? "–" : `${m.version ?? ""} ${m.querier ? `querier ${m.querier}, ${ago(m.querier_seen, live.now)}` : "no querier heard"}`;
	function update() {
		if (!live.status) return;
		into.replaceChildren(h("h2", {}, "Interfaces"),
			table("Interfaces that rules use", ["Name", "Link", "Program", "Used as", "IGMP", "MLD", "Joins", "Unsent", "Note"], live.status.interfaces.map((i) =>
				[i.name, state(i.link), i.mode || "–", i.roles.join(", "), querier(i.igmp), querier(i.mld), `${i.joins_succeeded} of ${i.joins_attempted}`, count(i.transmit_drops), i.note ?? ""])),
			live.status.workers.length ? table("Workers", ["Interface", "Path", "Queue", "State", "Received", "Lost"], live.status.workers.map((w) => [w.interface, w.path, w.queue, state(w.state), count(w.received), count(sum(w.lost))])) : "",
			table("Dropped, over all rules", ["Reason", "Packets"], live.drops.filter((d) => d.packets).map((d) => [d.reason, count(d.packets)])));
	}
	update();
	return { update, leave() {} };
}

function membershipsPage(_, into) {
	let left = false, timer = 0, text = "";
	const rows = h("div"), found = h("p", { class: "dim", role: "status" });
	const search = h("input", { type: "search", "aria-label": "Search memberships", placeholder: "Search", oninput: () => { text = search.value.toLowerCase(); show(); } });
	let groups = [];
	const most = 300;
	function show() {
		const fit = groups.filter((g) => !text || JSON.stringify([g.group, g.source, g.interface, g.rules, g.state, g.detail]).toLowerCase().includes(text));
		found.textContent = fit.length > most ? `the first ${most} of ${fit.length}: search to see others` : `${fit.length} memberships`;
		rows.replaceChildren(table("Memberships", ["Group", "Interface", "State", "Rules", "Detail"], fit.slice(0, most).map((g) => [(g.source ? g.source + "@" : "") + g.group, g.interface, state(g.state), g.rules.join(" "), g.detail ?? ""])));
	}
	async function read() {
		try {
			const all = await ask("v1/groups");
			if (left) return;
			// What needs attention comes first.
			const order = { failed: 0, retrying: 1, wanted: 2, joined: 3 };
			groups = all.sort((a, b) => order[a.state] - order[b.state]);
			show();
		} catch (error) {
			if (!left) found.textContent = error.message;
		}
		if (!left) timer = setTimeout(read, document.hidden ? 60000 : 5000);
	}
	into.replaceChildren(h("h2", {}, "Memberships"), h("div", { class: "tools" }, search), found, rows);
	read();
	return { update() {}, leave() { left = true; clearTimeout(timer); } };
}

function route() {
	const [, at, name] = /^#\/([a-z]*)\/?(.*)$/.exec(location.hash) ?? [null, "rules", ""];
	section?.leave();
	let of = name;
	try { of = decodeURIComponent(name); } catch { /* typed by hand: no rule has such a name */ }
	const pages = { rules: of ? rulePage : rulesPage, memberships: membershipsPage, interfaces: interfacesPage, events: eventsPage, file: filePage, history: historyPage, edit: editPage };
	section = (own(pages, at) ?? rulesPage)(live, main, of);
	if (at === "rules" && !of && token()) {
		main.firstChild.append(h("a", { href: "#/edit/", class: "new" }, "New rule"));
	}
	for (const a of document.querySelectorAll("nav a")) {
		if (a.getAttribute("href") === "#/" + (own(pages, at) ? at : "rules")) a.setAttribute("aria-current", "page");
		else a.removeAttribute("aria-current");
	}
	document.title = (of ? of + " – " : "") + "xdpcast";
}

function access() {
	const button = document.getElementById("access");
	button.hidden = !writable;
	button.textContent = token() ? "Lock changes" : "Unlock changes";
	pending.update();
	route();
}

document.getElementById("access").addEventListener("click", () => {
	if (!token()) return unlock(access);
	setToken("");
	access();
});

addEventListener("hashchange", () => {
	if (!location.hash.startsWith("#/")) return; // the link to skip to the main part
	route();
	main.focus({ preventScroll: true });
});

route();
live.start();
ask("v1/access").then((a) => { writable = a.writable; access(); }, () => {});
