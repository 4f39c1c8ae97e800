// Package relay is the control loop and the backend of the control API: the only owner of the
// wanted rules. It passes the rules and a snapshot of the host's network (package network) to
// package plan, which decides, and has one reconciler for each kind of kernel object that
// implements the plan:
//
//	attachments   the relay program on interfaces     package loader
//	tags          VLAN tags that stay in the frames   ethtool
//	neighbours    next hops that are kept resolved    package network
//	tables        the flows, on all paths             packages loader and forward
//	memberships   joined groups                       package membership
//
// Each reads what the kernel holds and applies the difference; the kernel's answers are input of
// the next plan. See reconcile for the order. State kept from one round to the next is keyed by
// identity - the generation of an interface, the name of a flow - and is only what cannot be read
// anywhere: since when, and when to retry.
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
	// ConfigFile is the YAML rule file; empty for none.
	ConfigFile string
	// StateFile stores the rules added through the API, so that they outlive the process like the
	// kernel's state. Empty: the loader's RunFile api-rules.yaml.
	StateFile string
	// StateDir stores earlier sets of rules, and the unconfirmed change: a directory that outlives
	// a reboot. Empty: the loader's RunDir.
	StateDir string
	// Interfaces are attached even if no rule names them.
	Interfaces []string
	// Mode is the XDP attach mode.
	Mode loader.Mode
	// Mroutes selects the kernel's multicast routes to mirror; nil: the file's settings.
	Mroutes *rules.Mroute
	// Workers is the number of workers of an input of the fanout path; 0: one for each CPU that the
	// process may use.
	Workers int
	// Priority is the real-time priority of the workers of the user-space paths; 0: none, or that of Boost.
	Priority int
	// Boost gives them one while they need little time, if that is permitted: see forward.Boost.
	Boost bool
	// Place keeps workers that are not pinned off CPUs for which they wait: see forward.AFXDPOptions.
	Place bool
	// Steering says when packets are spread over the CPUs of these workers.
	Steering plan.Steering
	// Loader configures the pinned state. Its Logger is replaced.
	Loader loader.Options
	// Membership configures what keeps memberships beyond the process, and lets tests inject
	// faults. Its Logger is replaced.
	Membership membership.Options
	// AFXDP configures the AF_XDP path. Its Loader, Logger, Priority, Boost and Place are replaced.
	AFXDP forward.AFXDPOptions
	// Keeper keeps the rings of the fanout path beyond the process, nil: nothing does; and Kept are
	// those that it kept from an earlier one, nil: none. The relay takes ownership of Kept.
	Keeper forward.Keeper
	Kept   *forward.FanoutHandover
	// Standby is called when a process that waits to go on with what Keeper keeps, should this one be killed, would be of use
	// from now on, and when not. Nil: not called.
	Standby func(wanted bool)
	// Early is from Resume with the same options, nil: New calls it. The relay takes its path over.
	Early *Early
	// Logger receives log messages. Nil: discarded.
	Logger  *slog.Logger
	Version string
	// Predecessor is the paused process that this one takes over from; nil: none.
	Predecessor *Predecessor
	// Events receives every change of state; nil: none.
	Events *events.Log
	// Reconciled is called with the duration of each round of the control loop; nil: not called.
	Reconciled func(took time.Duration)
	// Beat is called by the running control loop every BeatEvery: a loop that hangs has no
	// heartbeat. Nil: not called.
	Beat      func()
	BeatEvery time.Duration

	// observeEvery replaces observePause, and clock the clock of unconfirmed changes, for tests.
	observeEvery time.Duration
	// observed is called when everything was read, for tests.
	observed func()
	clock    *history.Clock
}

// Relay is the control loop. It implements control.Backend, whose methods may be called from any
// goroutine while Run runs.
type Relay struct {
	opts Options
	log  *slog.Logger

	watcher *network.Watcher
	early   *Early // also has the taps of the user-space paths, and the boost of their workers

	commands chan command
	ended    chan struct{} // closed when Run has returned
	started  time.Time
	ready    bool

	// The following fields belong to the goroutine of Run.
	rules    []*plan.Rule  // wanted, by name; replaced as a whole, never modified
	mroute   *rules.Mroute // the file's settings of mirrored routes; nil: none
	planner  *plan.Planner
	plan     *plan.Plan        // the last one
	network  *network.Snapshot // its input
	stale    bool              // the rules or the answers differ from its input
	overlaps map[string]plan.Overlaps
	changes  changes
	// summary is of summed, earlier wanted rules: see summarize. It is made for the first added or removed one.
	summary *rules.Summary
	summed  []*plan.Rule
	// revised counts the changes of the rules of the file and the API.
	revised uint64

	kernel
	tags      *tags
	mroutes   *mroutes // nil if none are mirrored
	states    states
	changelog *changeLog

	handedOver bool        // to another process: Run ends and leaves everything as it is
	ending     bool        // programs stay attached
	restored   bool        // the memberships of an earlier process are taken over
	reconciled time.Time   // the last time
	pace       networkPace // of changes of the network
	observed   time.Time   // likewise, of everything
	observing  time.Duration
	macs       [][6]byte // of this host's interfaces, sorted
	macsKnown  bool      // the kernel has them
	looping    loopLog
	streams    streams
	echoes     echoes
	warnings   map[string]string

	unsaved bool // the file has other API rules than the daemon
	standby bool // as Options.Standby was last called

	igmp    igmpVersions
	thrift  thrift
	tidy    sync.WaitGroup
	tidying atomic.Bool // a tidy-up is scheduled
	many    atomic.Bool // there are manyEdits rules or more
}

// kernel is this process's access to the kernel's state: the loader, and the reconcilers, which
// hold its answers.
type kernel struct {
	loader      *loader.Loader
	attachments *attachments
	neighbours  *neighbours
	memberships *memberships
	tables      *tables
	refusals    *refusals
}

// New opens the pinned state, creating or adopting it, and reads the rules. Nothing changes in the
// kernel for rules that it already held. Helper sockets and interfaces are those of the calling
// thread's network namespace; Run must be called in the same one. The caller must Run the relay,
// which closes it.
//
// Errors to match: loader.ErrLocked and the other errors of loader.Open, and *rules.FileError for
// each error in the file.
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
		changes:   changes{api: setText{origin: plan.OriginAPI}, file: setText{origin: plan.OriginFile}},
	}
	// The path is opened for its first rule, too late to report errors.
	if err := opts.AFXDP.Validate(); err != nil {
		return nil, fmt.Errorf("path afxdp: %w", err)
	}
	early := opts.Early
	if early == nil {
		if early, err = Resume(opts); err != nil {
			return nil, err
		}
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, early.Close())
		}
	}()
	r.takeOver(early)
	r.openHistory()
	// The rules first: a broken file must not change the kernel.
	if err := r.readInitialRules(); err != nil {
		return nil, err
	}
	if r.tags, err = readTags(loader.RunFile(r.opts.Loader.RunDir, r.opts.Loader.PinDir, "offloads.json"), r.log); err != nil {
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

// openKernel opens the kernel's state, taking over that of an earlier process.
func (r *Relay) openKernel(groups membership.Options, inherited loader.Locks) (err error) {
	opts := &r.opts
	opts.Loader.Inherited = inherited
	opts.Loader.Replace = true // the rules are here
	opts.Loader.Later = true
	r.loader, err = loader.Open(opts.Loader)
	opts.Loader.Early = nil
	if err != nil {
		return err
	}
	r.planner = plan.New(r.planOptions())
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

func (r *Relay) planOptions() plan.Options {
	return plan.Options{
		Interfaces: r.opts.Interfaces, Steering: r.opts.Steering, FanoutWorkers: forward.FanoutWorkers(r.opts.Workers),
		Kernel: plan.Capabilities{SocketSG: r.loader.Capabilities().SocketMultiBuffer},
	}
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

// sizeMaps makes room for twice the existing rules, unless the caller chose a size.
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

// Run loads the rules, calls ready, and keeps the kernel in step until ctx ends. It closes the
// relay: memberships that nothing keeps are left, while programs, maps and rules stay in the kernel
// and keep working. It must run in the network namespace in which New was called.
func (r *Relay) Run(ctx context.Context, ready func()) (err error) {
	defer func() { err = errors.Join(err, r.close()) }()
	defer close(r.ended)
	if ctx.Err() != nil {
		return nil
	}
	r.aside(r.adopt)
	opts := &r.opts
	opts.Events.Add(events.Event{Kind: events.KindDaemon, State: stateStarted, Cause: fmt.Sprintf("version %s with %d rules", opts.Version, len(r.rules))})
	defer r.thrift.end()
	if r.many.Load() {
		r.thrift.begin()
	}
	_ = r.reconcile(nil) // errors are logged, shown and retried
	r.keepMirror()
	r.beginHistory()
	if r.many.Load() {
		r.tidyUp()
	}
	r.ready = true
	r.memberships.settling = false
	if ready != nil {
		ready()
	}
	r.followed()
	loops, echoes, mirror := time.NewTicker(loopCheck), time.NewTicker(echoCheck), time.NewTicker(keepaliveEvery)
	defer loops.Stop()
	defer echoes.Stop()
	defer mirror.Stop()
	keep := time.NewTimer(idle)
	defer keep.Stop()
	var beats <-chan time.Time
	if r.opts.Beat != nil && r.opts.BeatEvery > 0 {
		beat := time.NewTicker(r.opts.BeatEvery)
		defer beat.Stop()
		beats = beat.C
		r.opts.Beat()
	}
	for {
		r.undoIfDue()
		keep.Reset(r.keepRules())
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
			r.networkChanged()
		case look := <-r.memberships.looks:
			r.warnUnless(aboutGroups, r.memberships.looked(look))
			r.tellObserved()
			_ = r.reconcile(nil)
		case <-beats:
			r.opts.Beat()
		case <-loops.C:
			r.logLoops()
			r.watchStreams()
		case <-echoes.C:
			r.logEchoes()
		case <-timer.C:
			r.observeIfDue()
			r.stale = true // due retries are part of the answers
			if r.pace.waiting && r.pace.wake() <= 0 {
				r.followNetwork()
				break
			}
			_ = r.reconcile(nil)
		case <-keep.C: // above
		}
		timer.Stop()
	}
}

// adopt takes over the state of an earlier process.
func (r *Relay) adopt() {
	r.observed = time.Now()
	r.attachments.adopt(r.loader.Used())
	r.tables.adopt()
	r.warnUnless(aboutNeighbours, r.neighbours.observe())
}

func (r *Relay) close() error {
	r.tidy.Wait()
	r.changes.endAhead()
	r.igmp.close()
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

// command is a function for the goroutine of Run to call.
type command struct {
	fn   func() error
	done chan error
}

// do runs fn on the goroutine of Run, and waits for it. If ctx ends before that, fn is not run.
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

// Steering says when packets of the fanout path are spread over the workers' CPUs.
type Steering = plan.Steering

// The choices.
const (
	SteerAuto = plan.SteerAuto
	SteerOn   = plan.SteerOn
	SteerOff  = plan.SteerOff
)

// ParseSteering parses the output of Steering.String.
func ParseSteering(s string) (Steering, error) { return plan.ParseSteering(s) }
