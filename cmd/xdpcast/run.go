package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"os/exec"
	"os/signal"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/urfave/cli/v2"

	"xdpcast/internal/control"
	"xdpcast/internal/events"
	"xdpcast/internal/forward"
	"xdpcast/internal/hold"
	"xdpcast/internal/metrics"
	"xdpcast/internal/notify"
	"xdpcast/internal/privilege"
	"xdpcast/internal/relay"
	"xdpcast/internal/web"
	"xdpcast/pkg/loader"
)

func runCommand() *cli.Command {
	return &cli.Command{
		Name:  "run",
		Usage: "relay in the foreground: programs, memberships and the API",
		Description: "Loads the rules of the file and those added earlier through the API,\n" +
			"and keeps the kernel in step with interfaces as they come and go. SIGHUP reads the\n" +
			"file again; a broken file changes nothing. SIGINT and SIGTERM end the process, but\n" +
			"the kernel keeps relaying: \"xdpcast unload --all\" ends that, too. Below \"xdpcast hold\"\n" +
			"SIGTERM replaces the process, as SIGUSR2 does.",
		Flags: append([]cli.Flag{
			&cli.StringFlag{Name: "config", Aliases: []string{"c"}, Usage: "YAML `FILE` of rules"},
			&cli.BoolFlag{Name: "watch-config", Usage: "read the file again whenever it, or an included file, changes"},
			&cli.StringSliceFlag{Name: "interface", Aliases: []string{"i"}, Usage: "attach to `IFACE` even if no rule names it (repeatable)"},
			modeFlag(),
			&cli.UintFlag{Name: "max-rules", Usage: "room for `N` rules in the kernel", DefaultText: "16384, or twice those of the file"},
			&cli.UintFlag{Name: "max-outputs", Usage: "room for `N` outputs in the kernel", DefaultText: "65536, or twice those of the file"},
			&cli.UintFlag{Name: "fanout-workers", Usage: "serve each input of the fanout path with `N` workers", DefaultText: "one per CPU"},
			&cli.StringFlag{Name: "fanout-steer", Usage: "`WHEN` to spread packets of the fanout path over the workers' CPUs: on, off, or auto (network cards with fewer queues than workers)", Value: "auto"},
			&cli.StringFlag{Name: "worker-priority", Usage: "real-time `PRIORITY` of the workers of the afxdp and fanout paths (SCHED_FIFO): auto (the lowest, for up to half of a CPU's time, where no CPU is free, and permitted; implies --worker-placement auto), none, or always: 1 to 99", Value: "none"},
			&cli.StringFlag{Name: "worker-placement", Usage: "`WHETHER` the workers of the afxdp and fanout paths avoid CPUs for which they have waited: auto, or none (the scheduler alone places them)", Value: "none"},
			&cli.UintSliceFlag{Name: "read-group", Usage: "let members of group `GID` read through the API (repeatable)"},
			&cli.StringFlag{Name: "on-event", Usage: "call `PROGRAM` for each event, described in its environment"},
			&cli.StringFlag{Name: "log-level", Usage: "minimum `LEVEL` to log: debug, info, warn or error", Value: "info"},
		}, slices.Concat(mrouteFlags(), listenFlags(), afxdpFlags(), pinFlags(), []cli.Flag{stateDirFlag()}, userFlags(false))...),
		Action: func(c *cli.Context) error {
			if err := nargs(c, 0, 0); err != nil {
				return err
			}
			if c.Bool("watch-config") && c.String("config") == "" {
				return usagef("--watch-config: want a file to watch, too: --config FILE")
			}
			if err := checkHook(c); err != nil {
				return err
			}
			opts, err := relayOptions(c)
			if err != nil {
				return err
			}
			listen, err := listenOptions(c)
			if err != nil {
				return err
			}
			user, err := daemonUser(c)
			if err != nil {
				return err
			}
			return runRelay(c, opts, listen, user)
		},
	}
}

// checkHook checks that the program for events can be executed.
func checkHook(c *cli.Context) error {
	program := c.String("on-event")
	if !c.IsSet("on-event") {
		return nil
	}
	if _, err := exec.LookPath(program); err != nil {
		return usagef("--on-event %q: want a program, without arguments: %w", program, err)
	}
	return nil
}

func relayOptions(c *cli.Context) (relay.Options, error) {
	log, err := newLogger(c)
	if err != nil {
		return relay.Options{}, err
	}
	mode, err := loader.ParseMode(c.String("mode"))
	if err != nil {
		return relay.Options{}, usagef("--mode: %w", err)
	}
	for _, name := range []string{"max-rules", "max-outputs"} {
		if n := c.Uint(name); n > 1<<24 {
			return relay.Options{}, usagef("--%s %d: want at most %d", name, n, 1<<24)
		}
	}
	steering, err := relay.ParseSteering(c.String("fanout-steer"))
	if err != nil {
		return relay.Options{}, usagef("--fanout-steer: %w", err)
	}
	workers := c.Uint("fanout-workers")
	if workers > maxWorkers {
		return relay.Options{}, usagef("--fanout-workers %d: want at most %d", workers, maxWorkers)
	}
	priority, boost, err := workerPriority(c)
	if err != nil {
		return relay.Options{}, err
	}
	place, err := workerPlacement(c)
	if err != nil {
		return relay.Options{}, err
	}
	afxdp, err := afxdpOptions(c)
	if err != nil {
		return relay.Options{}, err
	}
	mroutes, err := mrouteOptions(c)
	if err != nil {
		return relay.Options{}, err
	}
	return relay.Options{
		AFXDP: afxdp, Mroutes: mroutes, Workers: int(workers), Priority: priority, Boost: boost, Place: place || boost, Steering: steering,
		ConfigFile: c.String("config"), StateDir: stateDir(c), Interfaces: c.StringSlice("interface"), Mode: mode,
		Loader: loaderOptions(c, log), Logger: log, Version: buildVersion(),
	}, nil
}

// workerPriority returns the workers' real-time priority, 0 for none, and whether they have one for a part of their time.
func workerPriority(c *cli.Context) (priority int, boost bool, err error) {
	switch text := c.String("worker-priority"); text {
	case "auto":
		return 0, true, nil
	case "none":
		return 0, false, nil
	default:
		priority, err := strconv.Atoi(text)
		if err != nil || priority < 1 || priority > forward.MaxPriority {
			return 0, false, usagef("--worker-priority %q: want auto, none, or 1 to %d", text, forward.MaxPriority)
		}
		return priority, false, nil
	}
}

// workerPlacement says whether workers avoid CPUs for which they wait.
func workerPlacement(c *cli.Context) (bool, error) {
	text := c.String("worker-placement")
	if text != "auto" && text != "none" {
		return false, usagef("--worker-placement %q: want auto or none", text)
	}
	return text == "auto", nil
}

// maxWorkers exceeds the number of CPUs of any machine; each worker has a ring of 16 MiB.
const maxWorkers = 1024

func newLogger(c *cli.Context) (*slog.Logger, error) {
	var level slog.Level
	text := c.String("log-level")
	switch strings.ToLower(text) {
	case "debug", "info", "warn", "error":
	default:
		return nil, usagef("--log-level %q: want debug, info, warn or error", text)
	}
	if err := level.UnmarshalText([]byte(text)); err != nil {
		return nil, usagef("--log-level: %w", err)
	}
	return slog.New(slog.NewTextHandler(c.App.ErrWriter, &slog.HandlerOptions{Level: level})), nil
}

// runRelay runs the relay and its API until the context ends, or either fails.
func runRelay(c *cli.Context, opts relay.Options, listen *listenConfig, user *privilege.User) (err error) {
	// From the start, or a signal while the rules are loaded would end the process.
	hangups, upgrades := make(chan os.Signal, 1), make(chan os.Signal, 1)
	signal.Notify(hangups, syscall.SIGHUP)
	signal.Notify(upgrades, syscall.SIGUSR2)
	restarts := make(chan os.Signal, 2)
	if restartsOnTerm(os.Args) {
		signal.Notify(restarts, syscall.SIGTERM)
		defer signal.Stop(restarts)
	}
	defer signal.Stop(hangups)
	defer signal.Stop(upgrades)
	path := programPath() // before another binary is installed
	var groups []uint32
	for _, gid := range c.UintSlice("read-group") {
		groups = append(groups, uint32(gid))
	}
	service, err := connectService(c.Context, opts.Logger, relay.Prepare)
	if errors.Is(err, io.EOF) {
		return nil // a standby that is not needed
	}
	if err != nil {
		return err
	}
	defer func() {
		service.failed(err)
		err = errors.Join(err, service.close())
	}()
	if restartsOnTerm(os.Args) && !service.manager.TakesOver() {
		service.tell(hold.RestartsOnTerm)
	}
	opts.Membership, opts.Predecessor, opts.Loader.Inherited = service.memberships(), service.predecessor(), service.locks()
	opts.Keeper, opts.Kept, opts.Standby = service.store, service.rings, service.wantStandby
	keptPriority(&opts, user)
	// Packets first: the kept rings hold a tenth of a second of them.
	if opts.Early, err = relay.Resume(opts); err != nil {
		return explainStart(err)
	}
	defer func() { err = errors.Join(err, opts.Early.Close()) }()
	if service.waitEnded() && !opts.Early.GoesOn() { // that had its locks until now, say
		if opts.Early, err = relay.Resume(opts); err != nil {
			return explainStart(err)
		}
	}
	// Only root may be able to read the keys and open the port.
	listening, err := listen.open(service.listener(passedHTTP), service.take(passedSecrets), opts.Logger)
	if err != nil {
		return err
	}
	if err := dropPrivileges(c, user, opts.Early, opts); err != nil {
		return errors.Join(explainStart(err), listening.close())
	}
	opts.Beat, opts.BeatEvery = func() { service.tell(notify.Watchdog) }, service.manager.WatchdogInterval()/3
	// The socket first: a daemon that must not run must not touch the kernel.
	listener, err := listenAPI(c.String("socket"), service.listener(passedAPI), groups)
	if err != nil {
		return errors.Join(explainStart(err), listening.close())
	}
	takesOver := opts.Predecessor != nil
	// Before the file is read, so that no change is missed.
	watcher, err := watchConfig(c, opts)
	if err != nil {
		return errors.Join(err, listener.Close(), listening.close())
	}
	opts.Events = events.Open(events.Options{File: loader.RunFile(opts.Loader.RunDir, opts.Loader.PinDir, "events.ndjson"), Logger: opts.Logger})
	reconciles := metrics.NewReconciles()
	opts.Reconciled = func(took time.Duration) { reconciles.Observe(took.Seconds()) }
	var r *relay.Relay
	service.prepare(func() { r, err = relay.New(opts) })
	if err != nil {
		return errors.Join(explainStart(err), listener.Close(), listening.close(), watcher.close())
	}
	endEvents := runEvents(opts.Events, c.String("on-event"), opts.Logger)
	defer endEvents()
	observed := metrics.Observe(r)
	scrapes := metrics.Handler(observed, metrics.Options{Rules: listen.rules, Log: opts.Logger, Events: opts.Events, Reconciles: reconciles})
	ctx, cancel := context.WithCancel(c.Context)
	defer cancel()
	defer service.watchHolder(cancel)()
	up := &upgrader{ctx: ctx, service: service, relay: r, path: path, api: listener, web: listening, listen: listen}
	served := make(chan error, 2)
	begin := make(chan struct{}) // a daemon that takes over answers only then
	if !takesOver {
		close(begin)
	}
	go func() {
		defer cancel()
		select {
		case <-begin:
		case <-ctx.Done():
		}
		served <- control.NewServer(observed, control.Options{Log: opts.Logger, ReadGroups: groups, Metrics: http.StripPrefix("/v1", scrapes), Events: opts.Events, Upgrade: up.upgrade, Tap: r.Tap}).Serve(ctx, listener)
	}()
	go func() {
		defer cancel()
		select {
		case <-begin:
		case <-ctx.Done():
		}
		page := web.Handler(web.Options{
			Context: ctx, Backend: observed, Matched: r.Matched, Events: opts.Events, Metrics: scrapes, Token: listen.token, Names: listen.names, Log: opts.Logger,
		})
		served <- listening.serve(ctx, page, opts.Logger)
	}()
	var reloads sync.WaitGroup
	reloads.Go(func() { reloadOnHangup(ctx, hangups, observed, opts.Logger) })
	reloads.Go(func() { watcher.reload(ctx, observed) })
	reloads.Go(func() { up.upgradeOnSignal(ctx, upgrades) })
	reloads.Go(func() { up.restartOnSignal(ctx, restarts, cancel) })
	err = r.Run(ctx, func() {
		opts.Logger.Info("ready", "socket", c.String("socket"), "pins", opts.Loader.PinDir)
		service.ready()
		if takesOver {
			listener.Own()
			close(begin)
		}
	})
	if !r.HandedOver() {
		service.tell(notify.Stopping)
	}
	cancel()
	endEvents() // ends the answers to followers, too
	reloads.Wait()
	return errors.Join(err, <-served, <-served)
}

// listenAPI listens on the control socket, or takes over the previous daemon's; nil if there is
// none.
func listenAPI(path string, passed net.Listener, groups []uint32) (*control.Listener, error) {
	if passed != nil {
		return control.Inherit(passed, path)
	}
	return control.Listen(path, groups)
}

// runEvents passes events to followers, and to a program, if one is named, until end is called.
func runEvents(log *events.Log, program string, logger *slog.Logger) (end func()) {
	ctx, cancel := context.WithCancel(context.Background())
	hooked, unhook := context.WithCancel(context.Background())
	var running sync.WaitGroup
	running.Go(func() { log.Run(ctx) })
	if program != "" {
		reader := log.ReadAfter(log.Last())
		running.Go(func() { events.Hook{Program: program, Log: logger}.Run(hooked, reader) })
	}
	return func() {
		cancel()
		// The program also gets the last events, such as that the daemon ends.
		stop := time.AfterFunc(lastEvents, unhook)
		running.Wait()
		stop.Stop()
		unhook()
	}
}

// lastEvents is the total time for the event program when the daemon ends.
const lastEvents = 2 * time.Second

func reloadOnHangup(ctx context.Context, hangups <-chan os.Signal, r control.Backend, log *slog.Logger) {
	for {
		select {
		case <-ctx.Done():
			return
		case <-hangups:
		}
		_ = reloadFor(ctx, "SIGHUP", r, log) // logged
	}
}

// reloadFor reads the file again when no client waits for the answer.
func reloadFor(ctx context.Context, cause string, r control.Backend, log *slog.Logger) error {
	result, err := r.Reload(control.WithCause(ctx, cause), control.ApplyOptions{MaxChanges: 1}) // only counted here
	if err != nil {
		for line := range strings.SplitSeq(err.Error(), "\n") {
			log.Error("reload failed, keeping the old rules", "error", line, "cause", cause)
		}
		return err
	}
	log.Info("reloaded", "added", result.Added, "changed", result.Changed, "removed", result.Removed, "kept", result.Kept, "cause", cause)
	return nil
}

// explainStart adds to a start error what would help.
func explainStart(err error) error {
	switch {
	case errors.Is(err, control.ErrListening):
		return fmt.Errorf("%w: stop it first, or choose another --socket", err)
	case errors.Is(err, loader.ErrLocked):
		return fmt.Errorf("%w: stop it first (the kernel keeps relaying), or choose another --pin-dir", err)
	default:
		return withRootHint(err)
	}
}
