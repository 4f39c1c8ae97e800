// Changes: a form with the errors at their fields, and a difference shown before anything is done.
import { h } from "./dom.js";
import { ask, check, put, remove, apply, getRule, token, setToken } from "./api.js";

const dialog = () => document.getElementById("dialog");

function lines(rule) {
	const also = ["merge", "failover", "path"].filter((key) => rule[key] && rule[key] !== "auto");
	return [`${rule.name}:`, ...rule.in.split(" ").map((i) => `  in: ${i}`), ...rule.out.map((o) => `  out: ${o}`), ...also.map((key) => `  ${key}: ${rule[key]}`)];
}

// difference lists what a change adds and removes, line by line.
function difference(result) {
	const out = [];
	const line = (sign, text) => out.push(h("div", { class: { "+": "add", "-": "remove", " ": "" }[sign] }, sign + " " + text));
	for (const c of result.changes) {
		const now = c.op === "remove" ? [] : lines(c.rule), old = c.op === "add" ? [] : lines(c.op === "remove" ? c.rule : c.old);
		for (const l of old) line(now.includes(l) ? " " : "-", l);
		for (const l of now) if (!old.includes(l)) line("+", l);
	}
	const more = result.added + result.removed + result.changed - result.changes.length;
	if (more > 0) line(" ", `… and ${more} more rules`);
	return h("div", { class: "diff", tabindex: 0, role: "region", "aria-label": "Difference" }, out.length ? out : "nothing changes");
}

// confirmChange shows a difference, and applies it when confirmed; it resolves to true if applied.
export function confirmChange(title, result, act, probation = false) {
	return new Promise((done) => {
		const box = dialog();
		const fault = h("p", { class: "fault", role: "alert" });
		const within = h("select", { id: "within" }, [["", "none: the change is final"], ["30s", "undone after 30 seconds unless confirmed"], ["2m", "undone after 2 minutes unless confirmed"], ["10m", "undone after 10 minutes unless confirmed"]].map(([value, label]) => h("option", { value }, label)));
		const go = h("button", { type: "button", class: "primary", id: "apply", disabled: result.added + result.removed + result.changed === 0 && !result.mroute, onclick: async () => {
			go.disabled = true;
			try {
				await act(within.value, result.revision);
				box.returnValue = "done";
				box.close("done");
			} catch (error) {
				fault.textContent = error.message;
				go.disabled = false;
			}
		} }, "Apply");
		box.replaceChildren(h("h2", {}, title), h("p", {}, `${result.added} added, ${result.changed} changed, ${result.removed} removed`), difference(result),
			result.mroute && h("p", {}, { add: "Multicast routes are mirrored", remove: "Multicast routes are no longer mirrored", change: "The settings of multicast routes change" }[result.mroute]) || "",
			probation && h("p", {}, h("label", { for: "within" }, "Probation"), within) || "", fault,
			h("div", { class: "tools" }, go, h("button", { type: "button", onclick: () => box.close("") }, "Cancel")));
		box.addEventListener("close", () => done(box.returnValue === "done"), { once: true });
		box.returnValue = "";
		box.showModal();
	});
}

export async function removeRule(rule) {
	const result = { added: 0, changed: 0, removed: 1, changes: [{ op: "remove", rule }] };
	if (await confirmChange("Delete rule " + rule.name, result, () => remove(rule.name))) location.hash = "#/rules";
}

export function unlock(changed) {
	const box = dialog();
	const input = h("input", { type: "password", id: "token", autocomplete: "off", required: true });
	box.replaceChildren(h("h2", {}, "Unlock changes"), h("form", { method: "dialog", onsubmit: (e) => {
		e.preventDefault();
		setToken(input.value.trim());
		box.close();
		changed();
	} }, h("label", {}, "Token", input), h("p", { class: "dim" }, "The content of the daemon's --token-file. It is kept in this tab alone."),
		h("div", { class: "tools" }, h("button", { class: "primary" }, "Unlock"), h("button", { type: "button", onclick: () => box.close() }, "Cancel"))));
	box.showModal();
}

export function editPage(live, main, name) {
	const isNew = !name;
	let timer = 0, left = false;
	const field = (id, label, input, hint) => {
		input.id = id;
		input.setAttribute("aria-describedby", id + "-fault");
		return h("div", {}, h("label", { for: id }, label), hint && h("p", { class: "dim" }, hint), input, h("p", { class: "fault", id: id + "-fault", "aria-live": "polite" }));
	};
	const nameInput = h("input", { required: true, autocomplete: "off", spellcheck: "false", readonly: !isNew, oninput: later });
	const input = h("input", { required: true, autocomplete: "off", spellcheck: "false", placeholder: "239.1.1.1:5000%eth0", oninput: later });
	const merge = h("input", { autocomplete: "off", spellcheck: "false", placeholder: "rtp,skew=50ms", oninput: later });
	const failover = h("input", { autocomplete: "off", spellcheck: "false", placeholder: "30ms,back=2s", oninput: later });
	const path = h("select", { onchange: later }, ["auto", "kernel", "afxdp", "fanout"].map((p) => h("option", { value: p }, p)));
	const outs = h("div");
	const whole = h("p", { class: "fault", role: "alert" });
	const form = h("form", { novalidate: true, onsubmit: submit },
		field("name", "Name", nameInput), field("in", "Input", input, "[SOURCE@]ADDRESS[/LEN][:PORT]%INTERFACE, then options after commas; blanks between several inputs that carry one stream"),
		field("merge", "Merge", merge, "for several inputs: the format of the numbers by which they are merged"),
		field("failover", "Failover", failover, "or instead: the time for which an input may be silent before the next one is relayed"),
		h("fieldset", {}, h("legend", {}, "Outputs"), outs, h("button", { type: "button", onclick: () => { addOut(""); outs.lastChild.querySelector("input").focus(); } }, "Add an output")),
		field("path", "Path", path), whole,
		h("div", { class: "tools" }, h("button", { class: "primary", id: "preview" }, "Show the difference"), h("a", { href: isNew ? "#/rules" : "#/rules/" + encodeURIComponent(name) }, "Cancel")));
	main.replaceChildren(h("h2", {}, isNew ? "New rule" : "Edit rule " + name), token() ? form : h("p", {}, "Changes are locked: unlock them first."));

	function addOut(text) {
		const i = outs.children.length;
		const box = h("input", { id: "out" + i, value: text, "aria-label": "Output " + i, "aria-describedby": `out${i}-fault`, autocomplete: "off", spellcheck: "false", placeholder: "239.2.2.2:6000%eth1,ttl=8", oninput: later });
		outs.append(h("div", { class: "field" }, h("div", { class: "out" }, box, h("button", { type: "button", "aria-label": "Remove output " + i, onclick: () => {
			const rest = values().out.filter((_, at) => at !== i);
			outs.replaceChildren();
			(rest.length ? rest : [""]).forEach(addOut);
			later();
		} }, "Remove")), h("p", { class: "fault", id: `out${i}-fault`, "aria-live": "polite" })));
	}

	const values = () => ({ name: nameInput.value.trim(), in: input.value.trim(), out: [...outs.querySelectorAll("input")].map((o) => o.value.trim()), path: path.value, merge: merge.value.trim(), failover: failover.value.trim() });

	function later() {
		clearTimeout(timer);
		timer = setTimeout(() => validate(false), 300);
	}

	// validate shows the errors at each field; those of fields not filled in yet only if all is
	// set.
	async function validate(all) {
		clearTimeout(timer);
		const rule = values();
		const result = await check(rule);
		if (left) return false;
		const faults = new Map();
		for (const f of result.faults) {
			const id = f.field.replace(/^out\[(\d+)\]$/, "out$1");
			if (!faults.has(id)) faults.set(id, f.message);
		}
		whole.textContent = "";
		for (const [id, message] of faults) if (!document.getElementById(id)) whole.textContent = message;
		for (const box of form.querySelectorAll("input, select")) {
			const message = box.value || all ? faults.get(box.id) ?? "" : "";
			document.getElementById(box.id + "-fault").textContent = message;
			box.setAttribute("aria-invalid", message ? "true" : "false");
		}
		return result.faults.length === 0;
	}

	async function submit(e) {
		e.preventDefault();
		try {
			if (!await validate(true)) {
				form.querySelector("[aria-invalid=true]")?.focus();
				return;
			}
			const rule = values();
			if (isNew && live.rules.has(rule.name)) throw new Error(`rule ${rule.name} is there already: choose another name, or edit it`);
			const result = await put(rule, true);
			if (await confirmChange(isNew ? "Add rule " + rule.name : "Change rule " + rule.name, result, (within, revision) => put(rule, false, within, revision), true)) location.hash = "#/rules/" + encodeURIComponent(rule.name);
		} catch (error) {
			whole.textContent = error.message;
		}
	}

	if (isNew) addOut("");
	else getRule(name).then((r) => {
		nameInput.value = r.name;
		input.value = r.in;
		path.value = r.path || "auto";
		merge.value = r.merge ?? "";
		failover.value = r.failover ?? "";
		r.out.forEach(addOut);
	}, (error) => { whole.textContent = error.message; });
	return { update() {}, leave() { left = true; clearTimeout(timer); } };
}

// filePage shows the rules as a file, to save and to apply.
export function filePage(live, main) {
	const text = h("textarea", { id: "yaml", spellcheck: "false", "aria-describedby": "yaml-fault", readonly: !token() });
	const fault = h("p", { class: "fault", id: "yaml-fault", role: "alert" });
	main.replaceChildren(h("h2", {}, "Rules as a file"),
		h("p", { class: "tools" }, h("a", { href: "v1/export", download: "rules.yaml" }, "Export all rules"), h("a", { href: "v1/export?origin=api", download: "api-rules.yaml" }, "Export those added here")),
		h("form", { onsubmit: async (e) => {
			e.preventDefault();
			fault.textContent = "";
			try {
				const result = await apply(text.value, true);
				if (await confirmChange("Replace the rules that were added here", result, (within, revision) => apply(text.value, false, within, revision), true)) location.hash = "#/rules";
			} catch (error) {
				fault.textContent = error.message;
			}
		} }, h("div", {}, h("label", { for: "yaml" }, "Rules that were added here or with xdpcast rule"), text, fault),
			token() && h("div", { class: "tools" }, h("button", { class: "primary" }, "Show the difference"))));
	ask("v1/export?origin=api").then((yaml) => { text.value = yaml; }, (error) => { fault.textContent = error.message; });
	return { update() {}, leave() {} };
}
