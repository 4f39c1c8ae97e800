// Package relay is the control loop: the one owner of what is wanted. It joins
// rules, memberships, interfaces and the loader, and keeps the kernel in step with
// them while interfaces come, go and change.
package relay

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"xdpcast/internal/rulefile"
	"xdpcast/pkg/control"
	"xdpcast/pkg/forward"
	"xdpcast/pkg/loader"
	"xdpcast/pkg/membership"
	"xdpcast/pkg/rules"
)

// Options configures a Relay.
type Options struct {
	// ConfigFile is the YAML file of rules; empty for none.
	ConfigFile string
	// StateFile keeps the rules that were added through the API, so that they
	// outlive the process as the kernel's state does. Empty: the loader's RunFile
	// api-rules.yaml.
	StateFile string
	// Interfaces are attached even while no rule names them.
	Interfaces []string
	// Mode is how XDP is attached.
	Mode loader.Mode
	// Workers is how many workers an input of the fanout path has; 0: one for each CPU that
	// the process may use.
	Workers int
	// Steering is when packets are spread over the CPUs of these workers.
	Steering Steering
	// Loader says where the pinned state is. Its Logger is replaced.
	Loader loader.Options
	// Membership is for tests that inject faults. Its Logger is replaced.
	Membership membership.Options
	// AFXDP says how the AF_XDP path runs. Its Loader and Logger are replaced.
	AFXDP forward.AFXDPOptions
	// Logger is told what happens. Nil: nobody.
	Logger  *slog.Logger
	Version string
}

// Relay is the control loop. It serves the control API as a control.Backend, whose
// methods may be called from any goroutine while Run runs.
type Relay struct {
	opts Options
	log  *slog.Logger

	loader *loader.Loader
	groups *membership.Manager
	watch  *watch
	hops   *hops

	commands chan command
	ended    chan struct{} // closed when Run has returned
	started  time.Time
	ready    bool

	// What follows belongs to the goroutine of Run.
	paths      userPaths
	rules      map[string]*wantedRule
	ordered    []*wantedRule               // the same, by name
	overlaps   map[string][]overlap        // by name; nil: not known
	inputs     map[rules.Input]*wantedRule // see inputIndex
	interfaces map[string]*iface           // by name
	own        []netip.Addr                // addresses of this host, sorted
	ownKnown   bool                        // the kernel has them
	features   map[int]loader.Features     // by interface index; see featuresOf
	offloads   *offloads
	round      uint64 // counts reconciles
	tidy       sync.WaitGroup
	tidying    atomic.Bool // a tidy-up is to come
	reconciled time.Time   // the last time
	allDirty   bool        // every rule is to be resolved again
	unsynced   bool        // the kernel does not hold what is resolved
	wants      map[membershipKey]*wantedMembership
	igmp       igmpVersions
	attachErrs map[int]error
	keep       map[int]bool // interfaces that were attached before any rule
	warnings   map[string]string
}

// New opens the pinned state, made or adopted, and reads the rules. Nothing in the
// kernel changes for rules that it held already. Helper sockets and interfaces are
// those of the calling thread's network namespace; Run must be called in the same.
// The caller must Run the relay, which closes it.
//
// Errors to match: loader.ErrLocked and the other errors of loader.Open, and
// *rules.FileError for each fault of the file.
func New(opts Options) (_ *Relay, err error) {
	if opts.Logger == nil {
		opts.Logger = slog.New(slog.DiscardHandler)
	}
	if opts.Loader, err = opts.Loader.Absolute(); err != nil {
		return nil, err
	}
	if opts.StateFile == "" {
		opts.StateFile = loader.RunFile(opts.Loader.RunDir, opts.Loader.PinDir, "api-rules.yaml")
	}
	opts.Loader.Logger, opts.Membership.Logger = opts.Logger, opts.Logger
	r := &Relay{
		opts: opts, log: opts.Logger, started: time.Now(),
		commands:   make(chan command),
		ended:      make(chan struct{}),
		rules:      map[string]*wantedRule{},
		interfaces: map[string]*iface{},
		features:   map[int]loader.Features{},
		wants:      map[membershipKey]*wantedMembership{},
		attachErrs: map[int]error{},
		keep:       map[int]bool{},
		warnings:   map[string]string{},
	}
	// The path is opened for its first rule, which is late to hear of it.
	if err := opts.AFXDP.Validate(); err != nil {
		return nil, fmt.Errorf("path afxdp: %w", err)
	}
	// The rules first: a broken file must not touch the kernel.
	if err := r.readInitialRules(); err != nil {
		return nil, err
	}
	if r.offloads, err = readOffloads(loader.RunFile(r.opts.Loader.RunDir, r.opts.Loader.PinDir, "offloads.json")); err != nil {
		return nil, err
	}
	r.sizeMaps()
	if r.loader, err = loader.Open(r.opts.Loader); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, r.close())
		}
	}()
	if err := r.setUpSteering(); err != nil {
		return nil, err
	}
	r.groups = membership.New(opts.Membership)
	r.paths = r.newUserPaths()
	if r.watch, err = newWatch(); err != nil {
		return nil, err
	}
	r.hops = newHops(r.watch)
	return r, nil
}

// readInitialRules reads the file and the rules from the API of an earlier
// process. A rule of the file wins over one of the API.
func (r *Relay) readInitialRules() error {
	fromFile, err := r.readConfig()
	if err != nil {
		return err
	}
	for _, rule := range fromFile {
		r.rules[rule.Name] = &wantedRule{rule: rule, origin: control.OriginFile}
	}
	defer r.order()
	saved, err := readState(r.opts.StateFile)
	if err != nil {
		return err
	}
	saved = r.withoutConflicts(fromFile, saved)
	if len(saved) == 0 {
		return nil
	}
	// One by one only where something is wrong, since it takes the square of time.
	fits := rules.ValidateSet(slices.Concat(fromFile, saved)) == nil
	accepted := slices.Clone(fromFile)
	for _, rule := range saved {
		if !fits {
			if err := rules.ValidateSet(append(accepted, rule)); err != nil {
				r.log.Warn("rule added through the API is left out: it does not go with the file", "rule", rule.Name, "error", err)
				continue
			}
		}
		accepted = append(accepted, rule)
		r.rules[rule.Name] = &wantedRule{rule: rule, origin: control.OriginAPI}
	}
	return nil
}

// withoutConflicts leaves out the saved rules that have a name or an input of the
// file's.
func (r *Relay) withoutConflicts(fromFile, saved []rules.Rule) []rules.Rule {
	names, inputs := make(map[string]bool, len(fromFile)), make(map[rules.Input]bool, len(fromFile))
	for i := range fromFile {
		names[fromFile[i].Name], inputs[fromFile[i].In] = true, true
	}
	return slices.DeleteFunc(saved, func(rule rules.Rule) bool {
		taken := names[rule.Name] || inputs[rule.In]
		if taken {
			r.log.Warn("rule added through the API is left out: the file has its name or its input", "rule", rule.Name)
		}
		return taken
	})
}

func (r *Relay) readConfig() ([]rules.Rule, error) {
	if r.opts.ConfigFile == "" {
		return nil, nil
	}
	data, err := rulefile.ReadFile(r.opts.ConfigFile)
	if err != nil {
		return nil, fmt.Errorf("read configuration: %w", err)
	}
	return rulefile.Parse(r.opts.ConfigFile, data)
}

// sizeMaps makes room for twice the rules that are there, where the caller has not
// said how much.
func (r *Relay) sizeMaps() {
	outputs := 0
	for _, w := range r.rules {
		outputs += len(w.rule.Out)
	}
	grow := func(size *uint32, need, least int) {
		if *size != 0 {
			return
		}
		*size = uint32(max(least, 2*need))
	}
	grow(&r.opts.Loader.MaxRules, len(r.rules), loader.DefaultMaxRules)
	grow(&r.opts.Loader.MaxOutputs, outputs, loader.DefaultMaxOutputs)
}

// Run brings the rules in, calls ready, and keeps the kernel in step until ctx
// ends. It closes the relay: memberships are left, while programs, maps and rules
// stay in the kernel and go on. It must run in the network namespace that New was
// called in.
func (r *Relay) Run(ctx context.Context, ready func()) (err error) {
	defer func() { err = errors.Join(err, r.close()) }()
	defer close(r.ended)
	if ctx.Err() != nil {
		return nil
	}
	r.keepAdopted()
	r.warnUnless(aboutNeighbours, r.hops.adopt())
	r.allDirty, r.unsynced = true, true
	_ = r.reconcile(nil) // what is wrong is logged, shown, and tried again
	if len(r.rules) >= manyEdits {
		r.tidyUp()
	}
	r.ready = true
	if ready != nil {
		ready()
	}
	for {
		routes, wake := r.hops.wake(), r.nextWake()
		timer := time.NewTimer(min(routes, wake))
		select {
		case <-ctx.Done():
			timer.Stop()
			return nil
		case c := <-r.commands:
			c.done <- c.fn()
		case <-r.watch.changed:
			r.heed(r.watch.take())
		case <-timer.C:
			r.heed(news{})
			if wake <= routes {
				_ = r.reconcile(nil)
			}
		}
		timer.Stop()
	}
}

// keepAdopted notes interfaces that were attached by hand: neither a rule of the
// kernel's nor one of ours explains them.
func (r *Relay) keepAdopted() {
	used := map[int]bool{}
	for _, index := range r.loader.Used() {
		used[index] = true
	}
	for _, a := range r.loader.Attachments() {
		if !used[a.Index] {
			r.keep[a.Index] = true
		}
	}
}

func (r *Relay) close() error {
	r.tidy.Wait()
	var errs []error
	if r.watch != nil {
		errs = append(errs, r.watch.Close())
	}
	if r.hops != nil {
		r.hops.close()
	}
	if r.groups != nil {
		errs = append(errs, r.groups.Close())
	}
	errs = append(errs, r.paths.close())
	if r.loader != nil {
		errs = append(errs, r.loader.Close())
	}
	return errors.Join(errs...)
}

// command is something that the goroutine of Run is to do for another.
type command struct {
	fn   func() error
	done chan error
}

// do runs fn on the goroutine of Run. When ctx ends first, fn is not run; once it
// runs, it is waited for.
func (r *Relay) do(ctx context.Context, fn func() error) error {
	c := command{fn: fn, done: make(chan error, 1)}
	select {
	case r.commands <- c:
		return <-c.done
	case <-r.ended:
		return control.Errorf(control.KindUnavailable, "the relay is stopping")
	case <-ctx.Done():
		return control.Errorf(control.KindUnavailable, "the relay is busy: %w", ctx.Err())
	}
}
