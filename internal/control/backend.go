package control

import (
	"context"

	"xdpcast/pkg/rules"
)

// Backend is what the API serves: implemented by the relay, and by Client.
//
// Its methods are called concurrently. A ctx ends when the client disconnects or the server's grace
// period at shutdown is over; a change in progress is then finished or undone, never left half
// done. Errors have a kind: wrap ErrNotFound, ErrConflict, ErrInvalid, ErrUnavailable or use
// Errorf; an error without a kind is reported as KindFailed.
type Backend interface {
	Status(ctx context.Context) (Status, error)

	// Rules returns every rule, sorted by name.
	Rules(ctx context.Context) ([]RuleStatus, error)
	// Rule returns one rule; ErrNotFound.
	Rule(ctx context.Context, name string) (RuleStatus, error)
	// AddRule adds one rule; ErrInvalid, ErrConflict. A rule that waits for its interface is added
	// with state pending. After an error nothing of the rule remains.
	AddRule(ctx context.Context, r Rule) (RuleStatus, error)
	// PutRule adds a rule, or replaces the API rule with its name; ErrInvalid, ErrConflict. After
	// an error nothing has changed.
	PutRule(ctx context.Context, r Rule, o ApplyOptions) (ApplyResult, error)
	// DeleteRule removes an API rule; ErrNotFound, and ErrConflict for a rule of the daemon's own
	// file.
	DeleteRule(ctx context.Context, name string) error
	// Apply makes the API rules exactly these, which must be a valid set (rules.ValidateSet); those
	// of the daemon's own file are untouched. After an error nothing has changed.
	Apply(ctx context.Context, all []rules.Rule, o ApplyOptions) (ApplyResult, error)

	// Groups returns every membership, sorted by interface and group.
	Groups(ctx context.Context) ([]Group, error)
	Stats(ctx context.Context) (Stats, error)

	// Explain explains how a packet, given like the input of a rule, or the packets of a rule,
	// given by its name, are handled; ErrInvalid, ErrNotFound.
	Explain(ctx context.Context, packet string) (Explanation, error)

	// Reload reads the daemon's own file again and applies the difference.
	// After an error nothing has changed.
	Reload(ctx context.Context, o ApplyOptions) (ApplyResult, error)

	// Confirm makes the unconfirmed change final, and returns it; ErrConflict if there is none.
	// While a change waits, every other change is refused with ErrConflict.
	Confirm(ctx context.Context) (UnconfirmedChange, error)
	// History lists the kept sets, the current one first.
	History(ctx context.Context) ([]HistoryEntry, error)
	// Rollback restores the set of back changes ago, including the rules of the daemon's own file:
	// those stay current until the file's content differs from now, or it is reloaded. While a
	// change waits for confirmation, 1 undoes it; so does 0, which is ErrConflict if none waits.
	// ErrNotFound if fewer sets are kept. After an error nothing has changed.
	Rollback(ctx context.Context, back int, o ApplyOptions) (ApplyResult, error)
}
