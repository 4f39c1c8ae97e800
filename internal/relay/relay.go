// Package relay is the control loop, and what the control API asks: the one owner of
// what is wanted. It takes the rules and a snapshot of the host's network (package network)
// to package plan, which decides, and has one reconciler for each kind of thing in the kernel
// that brings about what the plan wants:
//
//	attachments   the relay program on interfaces     package loader
//	tags          VLAN tags that stay in the frames   ethtool
//	neighbours    next hops that are kept resolved    package network
//	tables        the flows, on all paths             packages loader and forward
//	memberships   joined groups                       package membership
//
// Each asks the kernel what it holds and applies the difference; what the kernel answers is part
// of the next plan. See reconcile for the order. What is remembered from one round to the next is
// keyed by identity - the life of an interface, the name of a flow - and is only
// what nobody can be asked for: since when, and when to try again.
package relay

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"sync/atomic"
	"time"

	"xdpcast/internal/control"
	"xdpcast/internal/events"
	"xdpcast/internal/forward"
	"xdpcast/internal/history"
	"xdpcast/internal/network"
	"xdpcast/internal/plan"
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
	// StateDir is where the sets of rules are kept that were in force, and the change that
	// waits for confirmation: a directory that outlives a reboot. Empty: the loader's RunDir.
	StateDir string
	// Interfaces are attached even while no rule names them.
	Interfaces []string
	// Mode is how XDP is attached.
	Mode loader.Mode
	// Mroutes says which multicast routes of the kernel are mirrored; nil: those that the file
	// says.
	Mroutes *rules.Mroute
	// Workers is how many workers an input of the fanout path has; 0: one for each CPU that
	// the process may use.
	Workers int
	// Steering is when packets are spread over the CPUs of these workers.
	Steering plan.Steering
	// Loader says where the pinned state is. Its Logger is replaced.
	Loader loader.Options
	// Membership says what keeps memberships beyond the process, and tests inject faults with
	// it. Its Logger is replaced.
	Membership membership.Options
	// AFXDP says how the AF_XDP path runs. Its Loader and Logger are replaced.
	AFXDP forward.AFXDPOptions
	// Logger receives what happens. Nil: discarded.
	Logger  *slog.Logger
	Version string
	// Predecessor is the process that this one takes over from, at rest meanwhile; nil: there is none.
	Predecessor *Predecessor
	// Events is told of every change of state; nil: nobody is.
	Events *events.Log
	// Reconciled is told how long each round of the control loop took; nil: nobody is.
	Reconciled func(took time.Duration)
	// Beat is called by the control loop as often as BeatEvery says while it turns: a loop that
	// hangs has no heartbeat. Nil: nothing is called.
	Beat      func()
	BeatEvery time.Duration

	// observeEvery replaces observePause, and clock that of changes that wait for confirmation,
	// for tests.
	observeEvery time.Duration
	// observed is told when everything was looked at, for tests.
	observed func()
	clock    *history.Clock
}

// Relay is the control loop. It serves the control API as a control.Backend, whose
// methods may be called from any goroutine while Run runs.
type Relay struct {
	opts Options
	log  *slog.Logger

	watcher *network.Watcher
	taps    forward.Taps // of the user-space paths

	commands chan command
	ended    chan struct{} // closed when Run has returned
	started  time.Time
	ready    bool

	// What follows belongs to the goroutine of Run.
	rules    []*plan.Rule  // wanted, by name; replaced as a whole, never changed
	mroute   *rules.Mroute // which routes the file says are mirrored; nil: none
	planner  *plan.Planner
	plan     *plan.Plan        // the last
	network  *network.Snapshot // that it was made from
	stale    bool              // the rules or the answers are others than those it was made from
	overlaps map[string]plan.Overlaps
	changes  changes

	kernel
	tags      *tags
	mroutes   *mroutes // nil when none are mirrored
	states    states
	changelog *changeLog

	handedOver bool      // to another process: Run ends without a trace
	restored   bool      // what an earlier process has joined is taken over
	reconciled time.Time // the last time
	observed   time.Time // likewise, everything
	observing  time.Duration
	macs       [][6]byte       // of this host's interfaces, sorted
	macsKnown  bool            // the kernel has them
	looping    map[string]bool // rules that the log was told of
	warnings   map[string]string

	igmp    igmpVersions
	tidy    sync.WaitGroup
	tidying atomic.Bool // a tidy-up is to come
}

// kernel is what this process has of the kernel's state: the loader, and the reconcilers, which hold
// what it answered.
type kernel struct {
	loader      *loader.Loader
	attachments *attachments
	neighbours  *neighbours
	memberships *memberships
	tables      *tables
	refusals    *refusals
}

// New opens the pinned state, made or adopted, and reads the rules. Nothing in the
// kernel changes for rules that it held already. Helper sockets and interfaces are
// those of the calling thread's network namespace; Run must be called in the same.
// The caller must Run the relay, which closes it.
//
// Errors to match: loader.ErrLocked and the other errors of loader.Open, and
// *rules.FileError for each fault of the file.
func New(opts Options) (_ *Relay, err error) {
	if opts, err = opts.withDefaults(); err != nil {
		return nil, err
	}
	r := &Relay{
		opts: opts, log: opts.Logger, started: time.Now(),
		commands: make(chan command),
		ended:    make(chan struct{}),
		plan:     &plan.Plan{}, network: network.NewSnapshot(nil, nil), stale: true,
		states:    states{log: opts.Logger, told: map[string]string{}},
		changelog: newChangeLog(opts.Events),
		warnings:  map[string]string{},
	}
	// The path is opened for its first rule, which is late to hear of it.
	if err := opts.AFXDP.Validate(); err != nil {
		return nil, fmt.Errorf("path afxdp: %w", err)
	}
	r.openHistory()
	// The rules first: a broken file must not touch the kernel.
	if err := r.readInitialRules(); err != nil {
		return nil, err
	}
	if r.tags, err = readTags(loader.RunFile(r.opts.Loader.RunDir, r.opts.Loader.PinDir, "offloads.json")); err != nil {
		return nil, err
	}
	r.sizeMaps()
	defer func() {
		if err != nil {
			err = errors.Join(err, r.close())
		}
	}()
	if err := r.openKernel(opts.Membership, opts.Loader.Inherited); err != nil {
		return nil, err
	}
	if r.mroutes, err = r.openMroutes(r.mroute); err != nil {
		return nil, err
	}
	r.watcher, err = network.Open(network.Options{Logger: r.log})
	return r, err
}

// openKernel opens what this process has of the kernel's state, taking over what another one, or
// itself before, had.
func (r *Relay) openKernel(groups membership.Options, inherited loader.Locks) (err error) {
	opts := &r.opts
	opts.Loader.Inherited = inherited
	if r.loader, err = loader.Open(opts.Loader); err != nil {
		return err
	}
	r.planner = plan.New(plan.Options{
		Interfaces: opts.Interfaces, Steering: opts.Steering, FanoutWorkers: forward.FanoutWorkers(opts.Workers),
		Kernel: plan.Capabilities{SocketSG: r.loader.Capabilities().SocketMultiBuffer},
	})
	if err := r.setUpSteering(); err != nil {
		return err
	}
	r.attachments = newAttachments(r.loader, opts.Mode, loader.RunFile(opts.Loader.RunDir, opts.Loader.PinDir, "attached.json"), r.log)
	r.memberships = newMemberships(membership.New(groups), r.log, opts.Events)
	r.neighbours = newNeighbours()
	r.tables = r.newTables()
	r.refusals = newRefusals(r.loader.Refusals, r.log)
	return nil
}

func (o Options) withDefaults() (_ Options, err error) {
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	if o.Loader, err = o.Loader.Absolute(); err != nil {
		return o, err
	}
	if o.StateFile == "" {
		o.StateFile = loader.RunFile(o.Loader.RunDir, o.Loader.PinDir, "api-rules.yaml")
	}
	if o.StateDir == "" {
		o.StateDir = o.Loader.RunDir
	}
	if o.observeEvery == 0 {
		o.observeEvery = observePause
	}
	o.Loader.Logger, o.Membership.Logger = o.Logger, o.Logger
	return o, nil
}

// sizeMaps makes room for twice the rules that are there, where the caller has not
// said how much.
func (r *Relay) sizeMaps() {
	outputs := 0
	for _, rule := range r.rules {
		outputs += len(rule.Out)
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
// ends. It closes the relay: memberships that nothing keeps are left, while programs, maps and rules
// stay in the kernel and go on. It must run in the network namespace that New was
// called in.
func (r *Relay) Run(ctx context.Context, ready func()) (err error) {
	defer func() { err = errors.Join(err, r.close()) }()
	defer close(r.ended)
	if ctx.Err() != nil {
		return nil
	}
	r.adopt()
	opts := &r.opts
	opts.Events.Add(events.Event{Kind: events.KindDaemon, State: stateStarted, Cause: fmt.Sprintf("version %s with %d rules", opts.Version, len(r.rules))})
	_ = r.reconcile(nil) // what is wrong is logged, shown, and tried again
	r.keepMirror()
	r.beginHistory()
	if len(r.rules) >= manyEdits {
		r.tidyUp()
	}
	r.ready = true
	r.memberships.settling = false
	if ready != nil {
		ready()
	}
	r.followed()
	loops, mirror := time.NewTicker(loopCheck), time.NewTicker(keepaliveEvery)
	defer loops.Stop()
	defer mirror.Stop()
	var beats <-chan time.Time
	if r.opts.Beat != nil && r.opts.BeatEvery > 0 {
		beat := time.NewTicker(r.opts.BeatEvery)
		defer beat.Stop()
		beats = beat.C
		r.opts.Beat()
	}
	for {
		r.undoIfDue()
		timer := time.NewTimer(r.wake())
		select {
		case <-ctx.Done():
			timer.Stop()
			opts.Events.Add(events.Event{Kind: events.KindDaemon, State: stateEnding, Cause: "it was told to"})
			r.handBack()
			return nil
		case <-r.mroutes.changed():
			_ = r.reconcile(nil)
		case <-mirror.C:
			r.keepMirror()
		case c := <-r.commands:
			c.done <- c.fn()
			if r.handedOver {
				timer.Stop()
				return nil
			}
		case <-r.watcher.Changed():
			r.tables.refresh = true
			_ = r.reconcile(nil)
		case look := <-r.memberships.looks:
			r.warnUnless(aboutGroups, r.memberships.looked(look))
			r.tellObserved()
			_ = r.reconcile(nil)
		case <-beats:
			r.opts.Beat()
		case <-loops.C:
			r.logLoops()
		case <-timer.C:
			r.observeIfDue()
			r.stale = true // what waits for its time is part of the answers
			_ = r.reconcile(nil)
		}
		timer.Stop()
	}
}

// adopt takes over what an earlier process left.
func (r *Relay) adopt() {
	r.observed = time.Now()
	r.attachments.adopt(r.loader.Used())
	r.tables.adopt()
	r.warnUnless(aboutNeighbours, r.neighbours.observe())
}

func (r *Relay) close() error {
	r.tidy.Wait()
	errs := []error{r.mroutes.close()}
	if r.watcher != nil {
		errs = append(errs, r.watcher.Close())
	}
	return errors.Join(append(errs, r.kernel.close())...)
}

// close closes what openKernel opened.
func (k *kernel) close() error {
	var errs []error
	if k.neighbours != nil {
		errs = append(errs, k.neighbours.close())
	}
	if k.memberships != nil {
		errs = append(errs, k.memberships.close())
	}
	if k.tables != nil {
		errs = append(errs, k.tables.paths.close())
	}
	if k.loader != nil {
		errs = append(errs, k.loader.Close())
	}
	*k = kernel{}
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

// Steering is when packets of the fanout path are spread over the workers' CPUs.
type Steering = plan.Steering

// The choices.
const (
	SteerAuto = plan.SteerAuto
	SteerOn   = plan.SteerOn
	SteerOff  = plan.SteerOff
)

// ParseSteering reads what Steering.String writes.
func ParseSteering(s string) (Steering, error) { return plan.ParseSteering(s) }
