// Package control is xdpcast's API: its types, and its server and client, HTTP and JSON over a unix
// socket.
//
//	GET    /v1/status                 Status
//	GET    /v1/rules                  []RuleStatus
//	POST   /v1/rules                  Rule -> 201 RuleStatus
//	PUT    /v1/rules[?dry_run=true]   []Rule -> ApplyResult
//	GET    /v1/rules/{name}           RuleStatus
//	PUT    /v1/rules/{name}[?dry_run=true]
//	                                  Rule -> ApplyResult
//	DELETE /v1/rules/{name}           204
//	POST   /v1/check                  Rule -> Check
//	GET    /v1/export[?origin=api]    the rules as a file (YAML)
//	GET    /v1/groups                 []Group
//	GET    /v1/stats                  Stats
//	GET    /v1/events[?since=N|TIME][&tail=N][&follow=true]
//	                                  Event, one a line, or as server-sent events
//	POST   /v1/reload                 ApplyResult
//	POST   /v1/confirm                UnconfirmedChange
//	GET    /v1/history                []HistoryEntry
//	POST   /v1/rollback[?back=N]      ApplyResult
//
// Bodies are JSON with the names in the types' tags; unknown keys are refused, in bodies and in
// queries. Every error answer is {"error": "one line", "kind": "..."}, see Kind. Lists are never
// null.
//
// Anybody may connect to the socket; the peer's credentials from the kernel (SO_PEERCRED and
// SO_PEERGROUPS, unix(7), socket(7)) determine its access: root and the daemon's own user read and
// write, members of Options.ReadGroups read, everyone else gets an error that names the missing
// access.
package control

// DefaultSocket is the daemon's default socket.
const DefaultSocket = "/run/xdpcast/xdpcast.sock"
