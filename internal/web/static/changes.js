// Sets of rules: earlier ones, the daemon's file, and a change that awaits confirmation.
import { h, ago } from "./dom.js";
import { token, getHistory, rollback, reload, confirm } from "./api.js";
import { confirmChange } from "./edit.js";

const pause = 5000;

// duration formats the time left for people.
export function duration(ms) {
	const s = Math.max(0, Math.ceil(ms / 1000)), two = (n) => String(n).padStart(2, "0");
	if (s < 60) return s + " s";
	if (s < 3600) return `${Math.floor(s / 60)} min ${two(s % 60)} s`;
	return `${Math.floor(s / 3600)} h ${two(Math.floor(s % 3600 / 60))} min`;
}

// PendingChange is the bar that shows a change that awaits confirmation.
export class PendingChange {
	#live; #at; #shown = ""; #left = null; #ends = 0;
	#fault = h("p", { class: "fault", role: "alert" });

	constructor(live, at) {
		this.#live = live;
		this.#at = at;
		setInterval(() => this.#tick(), 500);
	}

	update() {
		const p = this.#live.status?.unconfirmed;
		// The clocks of the two hosts may differ: use only differences of the daemon's times.
		this.#ends = p ? performance.now() + new Date(p.until).getTime() - this.#live.time : 0;
		const now = p ? JSON.stringify([p, Boolean(token())]) : "";
		if (now !== this.#shown) this.#build(p, now);
		this.#tick();
	}

	#build(p, now) {
		this.#shown = now;
		// Keep showing an action refused because it came too late.
		const late = !p && this.#fault.textContent;
		this.#at.hidden = !p && !late;
		if (late) return this.#at.replaceChildren(this.#fault, h("button", { type: "button", id: "dismiss", onclick: () => { this.#at.hidden = true; this.#fault.textContent = ""; } }, "Dismiss"));
		this.#fault.textContent = "";
		if (!p) return this.#at.replaceChildren();
		this.#left = h("span", { role: "timer", id: "left" });
		const button = (id, label, act) => h("button", { type: "button", id, class: id === "confirm" ? "primary" : "", onclick: async () => {
			const all = this.#at.querySelectorAll("button");
			this.#fault.textContent = "";
			for (const b of all) b.disabled = true;
			try {
				await act();
				this.#live.soon();
			} catch (error) {
				this.#fault.textContent = error.message;
			}
			for (const b of all) b.disabled = false;
		} }, label);
		this.#at.replaceChildren(h("p", { role: "status" }, `${p.what}${p.uid === undefined ? "" : " by " + who(p)} is undone unless it is confirmed. Until then every other change is refused.`),
			h("p", { class: "tools" }, "Left: ", this.#left, token() ? [button("confirm", "Confirm", confirm), button("undo", "Undo", () => rollback(0))] : h("span", { class: "dim" }, "Unlock changes to confirm or undo it.")), this.#fault);
	}

	#tick() {
		if (!this.#shown) return;
		const text = duration(this.#ends - performance.now());
		if (this.#left.textContent !== text) this.#left.textContent = text;
	}
}

// A change without a user is the daemon's own, or was made with the token.
const who = (e) => e.uid === undefined ? "–" : e.uid === 0 ? "root" : "user " + e.uid;

// historyPage lists the sets that can be restored.
export function historyPage(live, main) {
	let left = false, timer = 0, shown = "";
	const fault = h("p", { class: "fault", role: "alert" });
	const rows = h("tbody");
	const again = h("button", { type: "button", id: "reload", onclick: () => change("Reload the daemon's file", reload) }, "Reload the file");
	main.replaceChildren(h("h2", {}, "Sets of rules"),
		token() ? h("div", { class: "tools" }, again, h("span", { class: "dim" }, live.status?.config ?? "")) : h("p", { class: "dim" }, "Unlock changes to bring a set back, or to reload the daemon's file."), fault,
		h("div", { class: "wide" }, h("table", { id: "history" }, h("caption", {}, "Sets that were in force, the newest first"),
			h("thead", {}, h("tr", {}, ["Back", "Since", "Who", "What"].map((t) => h("th", { scope: "col" }, t)), ["Rules", "Added", "Removed", "Changed"].map((t) => h("th", { scope: "col", class: "num" }, t)), h("th", { scope: "col" }, ""))), rows)));

	// change shows what an action would do, and does it when confirmed.
	async function change(title, act) {
		fault.textContent = "";
		try {
			if (await confirmChange(title, await act(true), (within, revision) => act(false, within, revision), true)) {
				live.soon();
				await read();
			}
		} catch (error) {
			fault.textContent = error.message;
		}
	}

	// Numbers of sets shift with each change: check that the number is still that of the chosen
	// set.
	const bringBack = (e) => change(`Bring back the set of ${new Date(e.time).toLocaleString()}`, async (dryRun, within, revision) => {
		const now = (await getHistory()).find((o) => o.back === e.back);
		if (now?.time !== e.time) throw new Error("the rules have been changed meanwhile: pick the set again");
		return rollback(e.back, dryRun, within, revision);
	});

	async function read() {
		clearTimeout(timer);
		try {
			const all = await getHistory();
			const now = JSON.stringify(all);
			if (!left && now !== shown) {
				shown = now;
				rows.replaceChildren(...all.map((e) => h("tr", { "data-back": e.back }, h("td", {}, e.back || "in force"), h("td", {}, h("time", { datetime: e.time, title: ago(e.time, live.now) }, new Date(e.time).toLocaleString())), h("td", {}, who(e)), h("td", {}, e.what),
					[e.rules, e.added, e.removed, e.changed].map((n) => h("td", { class: "num" }, n)),
					h("td", {}, token() && e.back > 0 && h("button", { type: "button", "aria-label": `Bring back set ${e.back}`, onclick: () => bringBack(e) }, "Bring back")))));
			}
		} catch (error) {
			if (!left) fault.textContent = error.message;
		}
		if (!left) timer = setTimeout(read, document.hidden ? 60000 : pause);
	}
	read();
	return { update() {}, leave() { left = true; clearTimeout(timer); } };
}
