package control

import (
	"context"

	"xdpcast/pkg/rules"
)

// Backend is what the API serves: implemented by the relay, and by Client.
//
// Its methods are called concurrently. A ctx ends when the client goes away or
// the server's grace at shutdown is over; a change that is under way then is
// finished or undone, never left half done. Errors carry a kind: wrap
// ErrNotFound, ErrConflict, ErrInvalid, ErrUnavailable or use Errorf; one
// without a kind is reported as KindFailed.
type Backend interface {
	Status(ctx context.Context) (Status, error)

	// Rules returns every rule, sorted by name.
	Rules(ctx context.Context) ([]RuleStatus, error)
	// Rule returns one rule; ErrNotFound.
	Rule(ctx context.Context, name string) (RuleStatus, error)
	// AddRule adds one rule; ErrInvalid, ErrConflict. A rule that waits for its
	// interface is added, its state says pending. After an error nothing of
	// the rule remains.
	AddRule(ctx context.Context, r Rule) (RuleStatus, error)
	// PutRule adds a rule, or replaces the one of its name that was added through the API; ErrInvalid,
	// ErrConflict. After an error nothing has changed.
	PutRule(ctx context.Context, r Rule, o ApplyOptions) (ApplyResult, error)
	// DeleteRule removes a rule that was added through the API; ErrNotFound,
	// and ErrConflict for a rule of the daemon's own file.
	DeleteRule(ctx context.Context, name string) error
	// Apply makes the rules that were added through the API exactly these, which
	// must hold together (rules.ValidateSet); those of the daemon's own file are
	// untouched. After an error nothing has changed.
	Apply(ctx context.Context, all []rules.Rule, o ApplyOptions) (ApplyResult, error)

	// Groups returns every membership, sorted by interface and group.
	Groups(ctx context.Context) ([]Group, error)
	Stats(ctx context.Context) (Stats, error)

	// Explain says what becomes of a packet, given as the input of a rule is, or of
	// those of a rule, given by its name; ErrInvalid, ErrNotFound.
	Explain(ctx context.Context, packet string) (Explanation, error)

	// Reload reads the daemon's own file again and applies the difference.
	// After an error nothing has changed.
	Reload(ctx context.Context, o ApplyOptions) (ApplyResult, error)

	// Confirm makes the change final that waits for it, and returns it; ErrConflict when
	// none does. While one waits, every other change is refused with ErrConflict.
	Confirm(ctx context.Context) (UnconfirmedChange, error)
	// History lists the sets that are kept, the one in force first.
	History(ctx context.Context) ([]HistoryEntry, error)
	// Rollback brings back the set of so many changes ago, the rules of the daemon's own
	// file among them: those stay in force until the file holds others than it does
	// now, or is reloaded. While a change waits for confirmation, 1 undoes that; 0 does so,
	// too, and is ErrConflict when none waits. ErrNotFound when fewer sets are kept. After an error nothing has changed.
	Rollback(ctx context.Context, back int, o ApplyOptions) (ApplyResult, error)
}
