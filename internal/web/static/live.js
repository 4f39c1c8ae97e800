// What the daemon does now: all rules with their rates, updated by server-sent events, or by
// polling if these do not get through.

import { own } from "./dom.js";

const kept = 60; // rates kept of each rule, one per step
const quiet = 25000; // ms of silence after which a stream counts as dead
const first = 5000; // ms in which a stream must start: a proxy may accept it and buffer its data

export class Live extends EventTarget {
	rules = new Map(); // by name: what the daemon reports, with rates and history: packets per second in each step
	step = 5; // seconds
	status = null;
	time = 0; // ms: of the last message, by the daemon's clock
	connection = "connecting";
	#last = null; // the previous message
	#source = null;
	#heard = 0;
	#begun = false; // the stream has sent something
	#failures = 0;
	#timer = 0;
	#stepped = 0; // end of the newest step of the history
	#took = 0; // its arrival, by the browser's clock

	start() {
		document.addEventListener("visibilitychange", () => document.hidden ? this.#stop() : this.#open());
		setInterval(() => this.#watch(), 1000);
		if (!document.hidden) this.#open();
	}

	// now is the daemon's time, in ms.
	get now() { return Date.now() + this.time - this.#took; }

	// soon shows a change at once when polling.
	soon() {
		if (this.#source || document.hidden) return; // a stream updates by itself
		clearTimeout(this.#timer);
		this.#poll();
	}

	#stop() {
		this.#source?.close();
		this.#source = null;
		clearTimeout(this.#timer);
	}

	#open() {
		this.#stop();
		this.#heard = Date.now();
		this.#begun = false;
		const source = new EventSource("v1/live");
		this.#source = source;
		source.addEventListener("live", (e) => {
			this.#failures = 0;
			this.#begun = true;
			this.#take(JSON.parse(e.data), "live");
		});
		source.onerror = () => { if (this.#source === source) this.#instead(); };
	}

	// instead polls if the stream does not get through. Retry a buffered stream later than a
	// refused one: it takes longer to detect.
	#instead(held = false) {
		this.#stop();
		this.#failures += held ? 3 : 1;
		this.#poll();
	}

	// poll polls once, and retries the stream at intervals.
	async #poll() {
		try {
			// Request the daemon's history if the page's own has a gap.
			const gap = Date.now() - this.#took > 2000 * this.step;
			const answer = await fetch(gap ? "v1/live?history" : "v1/live", { signal: AbortSignal.timeout(20000) });
			if (!answer.ok) throw new Error(answer.statusText);
			this.#take(await answer.json(), "polling");
		} catch {
			this.#say("gone");
		}
		const streamAgain = this.connection === "gone" || this.#failures < 3 || this.#failures % 10 === 0;
		clearTimeout(this.#timer);
		this.#timer = setTimeout(() => {
			if (document.hidden) return;
			if (streamAgain) this.#open();
			else { this.#failures++; this.#poll(); }
		}, Math.max(2000, 1000 * (this.#last?.every ?? 1)));
	}

	#watch() {
		if (this.#source && Date.now() - this.#heard > (this.#begun ? quiet : first)) this.#instead(!this.#begun);
	}

	#say(connection) {
		if (this.connection === connection) return;
		this.connection = connection;
		this.dispatchEvent(new Event("connection"));
	}

	#take(m, how) {
		this.#heard = this.#took = Date.now();
		const time = new Date(m.time).getTime();
		// A restarted daemon continues the counts: they are the kernel's.
		const seconds = this.#last ? (time - this.#last.time) / 1000 : 0;
		const names = new Set();
		for (const r of m.rules) {
			const old = this.rules.get(r.name);
			this.rules.set(r.name, Object.assign(old ?? { counters: null, rates: null, history: [], stepped: 0, idle: 0, dropless: dropping }, { reason: "", path: "" }, r));
			if (m.all) names.add(r.name);
		}
		for (const name of m.gone ?? []) this.rules.delete(name);
		if (m.history) this.step = m.history.step;
		const since = this.#stepped ? (time - this.#stepped) / 1000 : 0; // seconds
		const steps = Math.floor(since / this.step);
		for (const [name, r] of this.rules) {
			if (m.all && !names.has(name)) { this.rules.delete(name); continue; }
			const now = own(m.counters, name) ?? (m.all ? null : r.counters) ?? [0, 0, 0, 0, 0];
			const before = r.counters;
			r.counters = now;
			if (before && seconds > 0.2 && seconds < 120) {
				// A counter that ran backwards belongs to a new rule of this name.
				const d = now.map((n, i) => Math.max(0, n - before[i]) / seconds);
				r.rates = { packets: d[0], bits: 8 * d[1], sent: d[2], sentBits: 8 * d[3], drops: d[4] };
				r.idle = d[0] > 0 ? 0 : r.idle + seconds;
				r.dropless = d[4] > 0 ? 0 : r.dropless + seconds;
			} else if (seconds >= 120) r.rates = null;
			if (m.history) remember(r, m.history, steps);
			else if (steps > 0) push(r.history, Array(Math.min(steps, kept)).fill(before ? Math.max(0, now[0] - r.stepped) / since : 0));
			if (m.history || steps > 0 || !this.#stepped) r.stepped = now[0];
		}
		if (m.history || steps > 0 || !this.#stepped) this.#stepped = time;
		this.#last = { time, every: m.every };
		Object.assign(this, { status: m.status, drops: m.drops, unsent: m.unsent, lost: m.lost, time });
		this.#say(how);
		this.dispatchEvent(new Event("change"));
	}
}

function push(history, rates) {
	history.push(...rates);
	history.splice(0, history.length - kept);
}

// remember merges the daemon's history of a rule, the last steps of which the page has not seen.
// The page may have older steps than a daemon started recently.
function remember(r, history, steps) {
	const rates = own(history.rates, r.name) ?? [];
	r.history.splice(Math.max(0, r.history.length - Math.max(0, history.taken - steps)));
	push(r.history, [...Array(history.taken - rates.length).fill(0), ...rates]);
	if (rates.length && !rates.at(-1)) r.idle = (rates.length - 1 - rates.findLastIndex((rate) => rate > 0)) * history.step;
	else if (!rates.length) r.idle = history.taken * history.step;
}

const silence = 10, dropping = 10; // seconds

// condition is a rule's state, or the problem of an active one.
export function condition(r) {
	if (r.state !== "active") return r.state;
	if (r.dropless < dropping) return "dropping";
	return r.counters?.[0] > 0 && r.idle >= silence ? "silent" : "active";
}

const ranks = ["failed", "looping", "dropping", "silent", "active"];

// trouble ranks rules: the lower, the more urgent.
export function trouble(r) {
	const rank = ranks.indexOf(condition(r));
	return rank < 0 ? 2.5 : rank; // waiting rules
}
