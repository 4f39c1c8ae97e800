// Requests, with the token if there is one. It stays in this tab.

const key = "xdpcast-token";

export const token = () => sessionStorage.getItem(key);
export const setToken = (t) => t ? sessionStorage.setItem(key, t) : sessionStorage.removeItem(key);

export async function ask(path, options = {}) {
	const headers = new Headers(options.headers);
	if (token()) headers.set("Authorization", "Bearer " + token());
	let answer;
	try {
		answer = await fetch(path, { ...options, headers });
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
export const put = (rule, dryRun) => ask(rulePath(rule.name) + (dryRun ? "?dry_run=true" : ""), json("PUT", rule));
export const remove = (name) => ask(rulePath(name), { method: "DELETE" });
export const apply = (yaml, dryRun) => ask("v1/rules?max_changes=500" + (dryRun ? "&dry_run=true" : ""),
	{ method: "PUT", body: yaml, headers: { "Content-Type": "application/yaml" } });
