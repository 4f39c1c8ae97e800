// One rule: a drawing of its packets' path, its outputs, drops, memberships and events.
import { h, svg, state, rate, bits, bytes, count, ago, spark, lost, sum } from "./dom.js";
import { ask, getRule, token } from "./api.js";
import { condition } from "./live.js";
import { eventList } from "./events.js";
import { removeRule } from "./edit.js";

const pause = 2000;
const groupsEvery = 5; // memberships cover all rules: request them with every fifth reading

// legText describes what an input received.
function legText(l, r) {
	const ms = (seconds) => (seconds * 1000).toFixed(seconds < 0.01 ? 3 : 1) + " ms";
	const parts = [r.merge || r.failover ? `${(100 * l.share).toFixed(1)} % of what was relayed` : "", `${count(l.lost)} lost`, `${count(l.doubled)} twice`, `${count(l.reordered)} late`, `${count(l.resets)} jumps`, `${count(l.senders)} other senders`];
	if (l.jitter_by) parts.push(`jitter ${l.jitter_by === "gaps" ? "about " : ""}${ms(l.jitter_seconds)}`);
	if (r.merge) parts.push(`${count(l.behind)} numbers, ${ms(l.lag_seconds)} behind`, `${count(l.different)} copies differ`);
	return parts.filter(Boolean).join(", ");
}

// streamText describes what became of all inputs together.
function streamText(r) {
	if (r.merge) return `${count(r.stream.expected)} numbers, ${count(r.stream.lost)} lost on all inputs, ${count(r.stream.restarts)} restarts`;
	return `${count(r.stream.restarts)} changes of the input`;
}

export function rulePage(live, main, name) {
	const body = h("div", {}, h("p", { class: "dim" }, "reading"));
	const happened = h("div");
	main.replaceChildren(h("h2", {}, "Rule " + name), body, h("h3", {}, "Events"), happened);
	const events = eventList(happened, (e) => e.rule === name, 50);
	let before = null, left = false, timer = 0, readings = 0, groups = [];

	async function read() {
		try {
			const all = readings++ % groupsEvery === 0 ? ask("v1/groups") : null;
			const rule = await getRule(name);
			if (all) groups = (await all).filter((g) => g.rules.includes(name));
			if (left) return;
			const now = performance.now();
			show(rule, groups, before && { rule: before.rule, seconds: (now - before.at) / 1000 });
			before = { rule, at: now };
		} catch (error) {
			if (!left) body.replaceChildren(h("p", { class: "bad", role: "alert" }, error.message));
		}
		if (!left) timer = setTimeout(read, document.hidden ? 10 * pause : pause);
	}

	function show(r, groups, last) {
		const focused = body.contains(document.activeElement) ? document.activeElement.textContent : null;
		const per = (now, old) => last && old !== undefined ? Math.max(0, now - old) / last.seconds : null;
		const rates = {
			packets: per(r.matched.packets, last?.rule.matched.packets), bytes: per(r.matched.bytes, last?.rule.matched.bytes),
			dropped: per(sum(r.drops), last && sum(last.rule.drops)),
			outputs: r.outputs.map((o, i) => ({ sent: per(o.sent.packets, last?.rule.outputs[i]?.sent.packets), bytes: per(o.sent.bytes, last?.rule.outputs[i]?.sent.bytes),
				dropped: per(sum(o.drops), last?.rule.outputs[i] && sum(last.rule.outputs[i].drops)) })),
		};
		const facts = [["State", state(live.rules.has(name) ? condition(live.rules.get(name)) : r.state)], r.reason && ["Reason", r.reason], ["Input", r.in], ["Path", (r.used_path || "none") + " (" + (r.path || "auto") + ")"], ["From", r.origin],
			["Matched", `${count(r.matched.packets)} packets, ${bytes(r.matched.bytes)}, last ${ago(r.last_seen, live.now)}`]].filter(Boolean);
		for (const i of r.inputs) facts.push([i.input || "On " + i.interface, [state(i.state === "active" && i.leg?.relayed === false ? "standby" : i.state), " ", i.reason ?? "", i.leg ? h("div", {}, legText(i.leg, r)) : ""]]);
		if (r.stream && (r.merge || r.failover)) facts.push(["Stream", streamText(r)]);
		for (const alarm of r.stream?.alarms ?? []) facts.push(["Alarm", h("span", { class: "bad" }, alarm)]);
		const drops = [...r.drops.map((d) => ["before copying", d]), ...r.outputs.flatMap((o) => o.drops.map((d) => ["slot " + o.slot, d]))].filter(([, d]) => d.packets > 0);
		body.replaceChildren(
			h("dl", { class: "facts" }, facts.map(([k, v]) => [h("dt", {}, k), h("dd", {}, v)])),
			token() && r.origin === "api" && h("div", { class: "tools" },
				h("button", { type: "button", onclick: () => { location.hash = "#/edit/" + encodeURIComponent(name); } }, "Edit"),
				h("button", { type: "button", onclick: () => removeRule(r) }, "Delete")) || "",
			h("div", { class: "wide" }, drawing(r, rates)),
			spark(live.rules.get(name)?.history ?? [], rates.packets),
			h("div", { class: "wide" }, h("table", {}, h("caption", {}, "Outputs"),
				h("thead", {}, h("tr", {}, ["Slot", "Output", "State", "Next hop"].map((t) => h("th", { scope: "col" }, t)), ["Packets", "Bytes", "Now", "Dropped"].map((t) => h("th", { scope: "col", class: "num" }, t)))),
				h("tbody", {}, r.outputs.map((o, i) => h("tr", {}, h("td", {}, o.slot), h("td", {}, o.output), h("td", {}, state(o.state), o.reason && h("div", {}, o.reason)),
					h("td", {}, o.next_hop ? o.next_hop + (o.mac ? " at " + o.mac : "") : "–"),
					h("td", { class: "num" }, count(o.sent.packets)), h("td", { class: "num" }, bytes(o.sent.bytes)), h("td", { class: "num" }, rate(rates.outputs[i].sent)),
					h("td", { class: "num" + (sum(o.drops) ? " bad" : "") }, count(sum(o.drops)))))))),
			drops.length ? h("div", { class: "wide" }, h("table", {}, h("caption", {}, "Dropped"), h("thead", {}, h("tr", {}, h("th", { scope: "col" }, "Where"), h("th", { scope: "col" }, "Reason"), h("th", { scope: "col", class: "num" }, "Packets"))),
				h("tbody", {}, drops.map(([where, d]) => h("tr", {}, h("td", {}, where), h("td", {}, d.reason), h("td", { class: "num" }, count(d.packets))))))) : "",
			groups.length ? h("div", { class: "wide" }, h("table", {}, h("caption", {}, "Memberships"), h("tbody", {}, groups.map((g) => h("tr", {},
				h("td", {}, `${g.source ? g.source + "@" : ""}${g.group}%${g.interface}`), h("td", {}, state(g.state)), h("td", {}, g.detail ?? "")))))) : "");
		if (focused) [...body.querySelectorAll("button")].find((b) => b.textContent === focused)?.focus();
	}
	read();
	return { update() {}, leave() { left = true; clearTimeout(timer); events.close(); } };
}

const cut = (text, n) => text.length > n ? text.slice(0, n - 1) + "…" : text;

// drawing shows the packets' path: inputs, the path, outputs, and where packets are lost.
function drawing(r, rates) {
	const step = 58, h0 = 16, rows = Math.max(2, r.outputs.length), height = h0 + rows * step + 10;
	const middle = h0 + rows * step / 2 - 24;
	const box = (x, y, w, lines) => svg("g", {}, svg("rect", { x, y, width: w, height: 48, rx: 6 }),
		lines.map(([text, kind], i) => svg("text", { x: x + 10, y: y + 20 + 18 * i, class: kind }, text)));
	const dropped = sum(r.drops);
	const label = `${r.in} by path ${r.used_path || "none"}: ${count(r.matched.packets)} packets matched, ${count(dropped)} dropped before copying. ` +
		r.outputs.map((o) => `Slot ${o.slot} ${o.output}: ${o.state}, ${count(o.sent.packets)} sent, ${count(sum(o.drops))} dropped.`).join(" ");
	return svg("svg", { class: "way", viewBox: `0 0 980 ${height}`, role: "img", "aria-label": label },
		svg("path", { d: `M300 ${middle + 24} H390`, class: r.used_path ? "" : "off" }),
		box(10, middle, 290, [[cut(r.in, 38), ""], [`${rate(rates.packets, " packets/s")}, ${bits(rates.bytes === null ? null : 8 * rates.bytes)}`, "small"]]),
		box(390, middle, 150, [[r.used_path ? "path " + r.used_path : r.state, ""], [`${count(r.matched.packets)} matched`, "small"]]),
		dropped > 0 ? [svg("path", { d: `M465 ${middle + 48} v12`, class: "drop" }),
			svg("text", { x: 390, y: middle + 74, class: "lost" }, cut(`${count(dropped)} dropped: ${lost(r.drops).map((d) => d.reason).join(", ")}`, 40))] : [],
		r.outputs.map((o, i) => {
			const y = h0 + i * step, dropped = sum(o.drops), on = o.state === "active";
			const more = dropped > 0 ? [`${on ? rate(rates.outputs[i].sent, " packets/s") + ", " : ""}${count(dropped)} dropped: ${cut(lost(o.drops).map((d) => d.reason).join(", "), 24)}`, "lost"] : on ? [`${rate(rates.outputs[i].sent, " packets/s")}, ${count(o.sent.packets)} sent`, "small"] : [cut(o.reason ?? o.state, 46), "lost"];
			return [svg("path", { d: `M540 ${middle + 24} C580 ${middle + 24} 590 ${y + 24} 630 ${y + 24}`, class: on ? "" : "off" }), box(630, y, 340, [[cut(`${o.slot}: ${o.output}`, 46), ""], more])];
		}));
}
