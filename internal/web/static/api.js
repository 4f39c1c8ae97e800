// Requests, with the token if there is one. It stays in this tab.

const key = "xdpcast-token";

export const token = () => sessionStorage.getItem(key);
export const setToken = (t) => t ? sessionStorage.setItem(key, t) : sessionStorage.removeItem(key);

const patience = 70000; // ms: more than the daemon takes for any answer

export async function ask(path, options = {}) {
	const headers = new Headers(options.headers);
	if (token()) headers.set("Authorization", "Bearer " + token());
	let answer;
	try {
		answer = await fetch(path, { signal: AbortSignal.timeout(patience), ...options, headers });
	} catch {
		throw new Error("no answer from the daemon");
	}
	const text = await answer.text();
	let value = null;
	try { value = text && JSON.parse(text); } catch { value = text; }
	if (!answer.ok) throw new Error(value?.error ?? (typeof value === "string" && value.trim() || answer.statusText));
	return value;
}

const json = (method, body) => ({ method, body: JSON.stringify(body), headers: { "Content-Type": "application/json" } });
const rulePath = (name) => "v1/rules/" + encodeURIComponent(name).replaceAll(".", "%2E");

export const getRule = (name) => ask(rulePath(name));
export const check = (rule) => ask("v1/check", json("POST", rule));
const query = (o) => {
	const q = new URLSearchParams(Object.entries(o).filter(([, v]) => v)).toString();
	return q && "?" + q;
};
// Changes that are dry runs, or undone unless confirmed within a time.
// The rules must still be those of a revision, if one is given: what the user has seen is what is done.
const how = (dryRun, within, revision, more) => query({ max_changes: 500, ...more, dry_run: dryRun, confirm: within, revision });

export const put = (rule, dryRun, within, revision) => ask(rulePath(rule.name) + how(dryRun, within, revision), json("PUT", rule));
export const remove = (name) => ask(rulePath(name), { method: "DELETE" });
export const apply = (yaml, dryRun, within, revision) => ask("v1/rules" + how(dryRun, within, revision),
	{ method: "PUT", body: yaml, headers: { "Content-Type": "application/yaml" } });
export const reload = (dryRun, within, revision) => ask("v1/reload" + how(dryRun, within, revision), { method: "POST" });
export const getHistory = () => ask("v1/history");
export const rollback = (back, dryRun, within, revision) => ask("v1/rollback" + how(dryRun, within, revision, { back: String(back) }), { method: "POST" });
export const confirm = () => ask("v1/confirm", { method: "POST" });
