// Events, by polling: a stream would hold one of the six connections that a browser opens to a host,
// for each of its windows and tabs, and with six of them no other request gets through.
import { h } from "./dom.js";

const most = 500;
const pause = 2000; // ms between polls

function text(e) {
	const of = { output: () => `${e.output} of rule ${e.rule}`, membership: () => `${e.group}%${e.interface}`, neighbour: () => `${e.address} on ${e.interface}`, querier: () => `${e.address} on ${e.interface}` }[e.kind]?.() ?? e.rule ?? e.interface ?? "";
	if (e.kind === "missed") return e.count ? `${e.count} events missed` : e.cause;
	return `${(e.kind + " " + of).trim()}${e.count > 1 ? ` and ${e.count - 1} more, the last ${e.last}` : ""}: `;
}

// eventList shows matching events, newest first, until closed.
export function eventList(into, match, limit = most) {
	const list = h("ol", { class: "events", role: "log", "aria-label": "Events, the newest first", "aria-live": "off" });
	const none = h("p", { class: "dim" }, "none yet");
	into.replaceChildren(none, list);
	let last = 0, closed = false, timer = 0;
	async function poll() {
		try {
			const answer = await fetch("v1/events?" + (last ? "since=" + last : "tail=10000"), { signal: AbortSignal.timeout(20000) });
			const text = answer.ok ? await answer.text() : "";
			if (closed) return;
			show(text.split("\n").filter(Boolean).map((line) => JSON.parse(line)));
		} catch { /* the top of the page says that the daemon does not answer */ }
		if (!closed) timer = setTimeout(poll, document.hidden ? 30000 : pause);
	}
	function show(events) {
		for (const e of events) last = e.number ?? 0; // none after the numbers were restarted: then from the first on
		const fresh = events.filter(match).slice(-limit).reverse().map(line);
		if (!fresh.length) return;
		none.remove();
		list.prepend(...fresh);
		while (list.children.length > limit) list.lastChild.remove();
	}
	poll();
	return { close: () => { closed = true; clearTimeout(timer); } };
}

function line(e) {
	const when = new Date(e.time);
	return h("li", { "data-number": e.number }, h("span", { class: "no" }, e.number ?? "–"), h("time", { datetime: e.time, title: e.time }, when.toLocaleString()),
		text(e), e.state && h("strong", { class: e.state }, e.state.replace("_", " ")), e.before ? `, was ${e.before.replace("_", " ")}` : "", e.cause && e.kind !== "missed" ? `: ${e.cause}` : "");
}

export function eventsPage(live, main) {
	const into = h("div"), kinds = ["", "daemon", "rule", "output", "path", "membership", "interface", "program", "neighbour", "querier", "loop", "stream", "reload"];
	let list = null;
	const kind = h("select", { "aria-label": "Kind of event", onchange: open }, kinds.map((k) => h("option", { value: k }, k || "all kinds")));
	function open() {
		list?.close();
		list = eventList(into, (e) => !kind.value || e.kind === kind.value || e.kind === "missed");
	}
	main.replaceChildren(h("h2", {}, "Events"), h("div", { class: "tools" }, kind), into);
	open();
	return { update() {}, leave: () => list.close() };
}
