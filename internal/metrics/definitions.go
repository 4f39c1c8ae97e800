// Package metrics exports a relay's state to Prometheus. Every value is read at scrape time from
// the relay's own packet accounting, so nothing is counted twice; only reloads are counted for
// Prometheus alone.
package metrics

import "github.com/prometheus/client_golang/prometheus"

// metric describes one metric of the collector. docs/metrics.md is generated from these.
type metric struct {
	name   string
	kind   string
	help   string
	labels []string
}

// NewReconciles returns the histogram of the control loop's rounds, in seconds.
func NewReconciles() prometheus.Histogram {
	d := newDefinitions()
	return prometheus.NewHistogram(prometheus.HistogramOpts{Name: d.reconciles.name, Help: d.reconciles.help, Buckets: prometheus.ExponentialBuckets(0.0001, 4, 10)})
}

const (
	counter   = "counter"
	gauge     = "gauge"
	histogram = "histogram"
)

func define(kind, name, help string, labels ...string) *metric {
	return &metric{name, kind, help, labels}
}

// definitions are the metrics by subject. Names follow prometheus.io/docs/practices/naming.
type definitions struct {
	buildInfo, started, ready, warnings, rules      *metric
	passedPackets, passedBytes                      *metric
	broadcastPackets, broadcastBytes                *metric
	totalDropped, totalDroppedBytes                 *metric
	fragments, fragmentBytes                        *metric
	mroutes, mroutesAccelerated, mroutesLeft        *metric
	reloads, reloadSucceeded, reloadTime            *metric
	eventCount, reconciles                          *metric
	scrapeFailed                                    *metric
	ruleInfo, ruleState, ruleLast                   *metric
	ruleReceivedPackets, ruleReceivedBytes          *metric
	droppedPackets, droppedBytes                    *metric
	outputState, outputSentPackets, outputSentByte  *metric
	notedPackets, notedBytes                        *metric
	inputPackets, inputBytes                        *metric
	inputDroppedPackets, inputDroppedBytes          *metric
	legWon, legLost, legDiffer, legBehind, legBound *metric
	legDoubled, legReordered, legResets             *metric
	legSenders, legUnnumbered                       *metric
	streamExpected, streamLost, streamRestarts      *metric
	legJitter, legLag, legLast                      *metric
	unsent, lost                                    *metric
	interfaceInfo                                   *metric
	joinsAttempted, joinsSucceeded, joinsFailed     *metric
	leavesAttempted, leavesSucceeded, leavesFailed  *metric
	memberships, querierSeen, queries               *metric
	workers, workerReceived, workerFailures         *metric
}

func newDefinitions() definitions {
	return definitions{
		buildInfo:    define(gauge, "xdpcast_build_info", "The daemon's release, and the schema of its pinned state; always 1.", "version", "schema"),
		started:      define(gauge, "xdpcast_start_time_seconds", "Start time of the daemon, in seconds since 1970."),
		ready:        define(gauge, "xdpcast_ready", "1 once the rules are loaded."),
		warnings:     define(gauge, "xdpcast_warnings", "Number of warnings in \"xdpcast status\"."),
		scrapeFailed: define(gauge, "xdpcast_scrape_failed", "1 if reading the relay's counters failed, by what was read: those metrics are missing then.", "of"),

		rules:              define(gauge, "xdpcast_rules", "Rules by state.", "state"),
		passedPackets:      define(counter, "xdpcast_passed_packets_total", "Packets that no rule matched, left to the host."),
		passedBytes:        define(counter, "xdpcast_passed_bytes_total", "Bytes of the frames that no rule matched."),
		broadcastPackets:   define(counter, "xdpcast_passed_broadcast_packets_total", "Those of xdpcast_passed_packets_total that were IPv4 UDP in broadcast frames: rules match them only with broadcast=allow."),
		broadcastBytes:     define(counter, "xdpcast_passed_broadcast_bytes_total", "Bytes of the frames of xdpcast_passed_broadcast_packets_total."),
		totalDropped:       define(counter, "xdpcast_relay_dropped_packets_total", "Packets and copies dropped, by reason, over all rules, including removed ones and those not listed here.", "reason"),
		totalDroppedBytes:  define(counter, "xdpcast_relay_dropped_bytes_total", "Bytes of the frames of xdpcast_relay_dropped_packets_total.", "reason"),
		fragments:          define(counter, "xdpcast_fragments_total", "Fragments of UDP datagrams: first ones that a rule matched, later ones after their first, and orphans, whose first was not seen.", "kind"),
		fragmentBytes:      define(counter, "xdpcast_fragments_bytes_total", "Bytes of the frames of xdpcast_fragments_total.", "kind"),
		mroutes:            define(gauge, "xdpcast_mroutes", "Resolved multicast routes of the kernel; absent while none are mirrored."),
		mroutesAccelerated: define(gauge, "xdpcast_mroutes_accelerated", "Those of xdpcast_mroutes that are forwarded in XDP."),
		mroutesLeft:        define(gauge, "xdpcast_mroutes_left", "Those of xdpcast_mroutes that are left to the kernel, by reason.", "reason"),

		reloads:         define(counter, "xdpcast_reloads_total", "Attempted reloads of the daemon's file."),
		reloadSucceeded: define(gauge, "xdpcast_last_reload_successful", "1 if the last reload succeeded, or none was attempted yet."),
		reloadTime:      define(gauge, "xdpcast_last_reload_success_timestamp_seconds", "When a reload last succeeded, in seconds since 1970; the daemon's start before the first."),

		eventCount: define(counter, "xdpcast_events_total", "Changes of state since the daemon was started, by what changed; an event that stands for several counts as several.", "kind"),
		reconciles: define(histogram, "xdpcast_reconcile_duration_seconds", "Time that the control loop takes to reconcile the kernel with rules and network."),

		ruleInfo:            define(gauge, "xdpcast_rule_info", "A rule's origin, input and path; always 1. path is empty while none is used.", "rule", "origin", "input", "path"),
		ruleState:           define(gauge, "xdpcast_rule_state", "1 for the state that a rule is in.", "rule", "state"),
		ruleLast:            define(gauge, "xdpcast_rule_last_packet_timestamp_seconds", "When a packet last matched the rule, in seconds since 1970; absent before the first.", "rule"),
		ruleReceivedPackets: define(counter, "xdpcast_rule_received_packets_total", "Packets that matched the rule.", "rule"),
		ruleReceivedBytes:   define(counter, "xdpcast_rule_received_bytes_total", "Bytes of the frames that matched the rule.", "rule"),
		droppedPackets:      define(counter, "xdpcast_dropped_packets_total", "Packets of a rule dropped before copying (slot \"in\"), and copies dropped at an output, by reason.", "rule", "slot", "reason"),
		droppedBytes:        define(counter, "xdpcast_dropped_bytes_total", "Bytes of the frames of xdpcast_dropped_packets_total.", "rule", "slot", "reason"),
		notedPackets:        define(counter, "xdpcast_noted_packets_total", "Unusual packets of a rule that were not dropped, by reason: malformed, orphan_fragment, unfinished_checksum, echo.", "rule", "reason"),
		notedBytes:          define(counter, "xdpcast_noted_bytes_total", "Bytes of the frames of xdpcast_noted_packets_total.", "rule", "reason"),
		outputState:         define(gauge, "xdpcast_output_state", "1 for the state that an output is in.", "rule", "slot", "interface", "state"),
		outputSentPackets:   define(counter, "xdpcast_output_sent_packets_total", "Copies handed to the output's device.", "rule", "slot", "interface"),
		outputSentByte:      define(counter, "xdpcast_output_sent_bytes_total", "Bytes of the frames of xdpcast_output_sent_packets_total.", "rule", "slot", "interface"),

		inputPackets:        define(counter, "xdpcast_input_received_packets_total", "Packets that matched one of several inputs; xdpcast_rule_received_packets_total counts all of them.", "rule", "input"),
		inputBytes:          define(counter, "xdpcast_input_received_bytes_total", "Bytes of the frames of xdpcast_input_received_packets_total.", "rule", "input"),
		inputDroppedPackets: define(counter, "xdpcast_input_dropped_packets_total", "Packets of one of several inputs that were not relayed, by reason; xdpcast_dropped_packets_total counts them in slot \"in\".", "rule", "input", "reason"),
		inputDroppedBytes:   define(counter, "xdpcast_input_dropped_bytes_total", "Bytes of the frames of xdpcast_input_dropped_packets_total.", "rule", "input", "reason"),

		legWon:         define(counter, "xdpcast_leg_relayed_packets_total", "Packets received on one of several inputs and relayed.", "rule", "input"),
		legLost:        define(gauge, "xdpcast_leg_lost_numbers", "Numbers missing on one of several inputs, or on one with health=; late ones are subtracted.", "rule", "input"),
		legJitter:      define(gauge, "xdpcast_leg_jitter_seconds", "Interarrival jitter of an input (RFC 3550 section A.8), by timestamps or by gaps; absent while unknown.", "rule", "input", "by"),
		legLag:         define(gauge, "xdpcast_leg_lag_seconds", "Average delay of one of several inputs after the first copy of a number.", "rule", "input"),
		legLast:        define(gauge, "xdpcast_leg_last_packet_timestamp_seconds", "When an input last received a packet, in seconds since 1970; absent before the first.", "rule", "input"),
		legDiffer:      define(counter, "xdpcast_leg_different_packets_total", "Copies that differ from the packet relayed with the same number; one number in 64 is compared.", "rule", "input"),
		legBehind:      define(gauge, "xdpcast_leg_behind_numbers", "Numbers that one of several inputs is behind the newest.", "rule", "input"),
		legBound:       define(gauge, "xdpcast_leg_behind_limit_numbers", "Numbers that an input may be behind for its copies to be recognized; 0 with failover.", "rule", "input"),
		legDoubled:     define(counter, "xdpcast_leg_repeated_numbers_total", "Numbers received more than once on an input.", "rule", "input"),
		legReordered:   define(counter, "xdpcast_leg_reordered_numbers_total", "Numbers received after a later one on the same input.", "rule", "input"),
		legResets:      define(counter, "xdpcast_leg_resets_total", "Jumps of an input's numbers.", "rule", "input"),
		legSenders:     define(counter, "xdpcast_leg_sender_changes_total", "Changes of an input's sender, or session.", "rule", "input"),
		legUnnumbered:  define(counter, "xdpcast_leg_unnumbered_packets_total", "Packets of an input without their own number: heartbeats, RTCP, others.", "rule", "input"),
		streamExpected: define(counter, "xdpcast_stream_numbers_total", "Numbers expected since the stream of several inputs began; 0 with failover.", "rule"),
		streamLost:     define(gauge, "xdpcast_stream_lost_numbers", "Numbers that none of several inputs has received within the skew.", "rule"),
		streamRestarts: define(counter, "xdpcast_stream_restarts_total", "Restarts of the sender of several inputs, or with failover changes of the active input.", "rule"),

		unsent: define(counter, "xdpcast_interface_unsent_packets_total", "Frames handed to a device that it refused, by the kernel's reason; not known per rule.", "interface", "reason"),
		lost:   define(counter, "xdpcast_path_lost_packets_total", "Packets of rules lost before a path in user space received them; not known per rule.", "interface", "path", "reason"),

		interfaceInfo:   define(gauge, "xdpcast_interface_info", "How XDP runs on an interface that rules name; always 1. mode is empty while no program is attached.", "interface", "mode"),
		joinsAttempted:  define(counter, "xdpcast_joins_attempted_total", "Attempted joins of multicast groups: succeeded and failed ones.", "interface"),
		joinsSucceeded:  define(counter, "xdpcast_joins_succeeded_total", "Joins that succeeded.", "interface"),
		joinsFailed:     define(counter, "xdpcast_joins_failed_total", "Joins that failed.", "interface"),
		leavesAttempted: define(counter, "xdpcast_leaves_attempted_total", "Attempted leaves of multicast groups.", "interface"),
		leavesSucceeded: define(counter, "xdpcast_leaves_succeeded_total", "Leaves that succeeded.", "interface"),
		leavesFailed:    define(counter, "xdpcast_leaves_failed_total", "Leaves that failed.", "interface"),
		memberships:     define(gauge, "xdpcast_memberships", "Memberships by state.", "interface", "state"),
		querierSeen:     define(gauge, "xdpcast_querier_last_seen_timestamp_seconds", "When an IGMP or MLD querier was last heard on an interface, in seconds since 1970; absent if never.", "interface", "protocol", "querier"),
		queries:         define(counter, "xdpcast_queries_total", "IGMP or MLD queries heard on an interface since the program was attached; absent if none.", "interface", "protocol"),

		workers:        define(gauge, "xdpcast_workers", "Workers of the paths in user space by state.", "interface", "path", "state"),
		workerReceived: define(counter, "xdpcast_worker_received_packets_total", "Packets that a worker received.", "interface", "path", "queue"),
		workerFailures: define(counter, "xdpcast_worker_failures_total", "Failures of a worker, after each of which it was restarted.", "interface", "path", "queue"),
	}
}

// all lists the metrics in the order of the documentation.
func (d *definitions) all() []*metric {
	return []*metric{
		d.buildInfo, d.started, d.ready, d.warnings, d.scrapeFailed, d.rules,
		d.passedPackets, d.passedBytes, d.broadcastPackets, d.broadcastBytes, d.totalDropped, d.totalDroppedBytes, d.fragments, d.fragmentBytes,
		d.mroutes, d.mroutesAccelerated, d.mroutesLeft,
		d.reloads, d.reloadSucceeded, d.reloadTime, d.eventCount, d.reconciles,
		d.ruleInfo, d.ruleState, d.ruleLast, d.ruleReceivedPackets, d.ruleReceivedBytes,
		d.droppedPackets, d.droppedBytes, d.notedPackets, d.notedBytes, d.outputState, d.outputSentPackets, d.outputSentByte,
		d.inputPackets, d.inputBytes, d.inputDroppedPackets, d.inputDroppedBytes,
		d.legWon, d.legLost, d.legDiffer, d.legBehind, d.legBound, d.legDoubled, d.legReordered, d.legResets, d.legSenders, d.legUnnumbered,
		d.legJitter, d.legLag, d.legLast,
		d.streamExpected, d.streamLost, d.streamRestarts,
		d.unsent, d.lost, d.interfaceInfo,
		d.joinsAttempted, d.joinsSucceeded, d.joinsFailed, d.leavesAttempted, d.leavesSucceeded, d.leavesFailed,
		d.memberships, d.querierSeen, d.queries, d.workers, d.workerReceived, d.workerFailures,
	}
}
