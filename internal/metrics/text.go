package metrics

import (
	"strconv"
	"strings"
)

// sink collects samples in Prometheus's text format
// (prometheus.io/docs/instrumenting/exposition_formats), which groups the samples of a metric. It
// formats them at once: 10,000 rules have 200,000 samples, for which client_golang takes seconds,
// since it allocates, sorts and checks an object for each.
type sink struct {
	metrics []*metric
	samples map[*metric]*[]byte
}

func newSink(metrics []*metric) *sink {
	s := &sink{metrics: metrics, samples: make(map[*metric]*[]byte, len(metrics))}
	for _, m := range metrics {
		s.samples[m] = new([]byte)
	}
	return s
}

// put adds a sample; labels are the values of the metric's labels, in their order.
func (s *sink) put(m *metric, value float64, labels ...string) {
	samples := s.samples[m]
	b := append(*samples, m.name...)
	for i, label := range labels {
		b = append(b, "{,"[min(i, 1)])
		b = append(append(b, m.labels[i]...), '=', '"')
		b = append(appendEscaped(b, label), '"')
	}
	if len(labels) > 0 {
		b = append(b, '}')
	}
	b = append(strconv.AppendFloat(append(b, ' '), value, 'g', -1, 64), '\n')
	*samples = b
}

// appendEscaped appends a label's value, escaped.
func appendEscaped(b []byte, s string) []byte {
	plain := true
	for i := range len(s) {
		plain = plain && s[i] < 0x80 && s[i] != '"' && s[i] != '\\' && s[i] != '\n'
	}
	if plain {
		return append(b, s...)
	}
	return append(b, escapes.Replace(strings.ToValidUTF8(s, "\uFFFD"))...)
}

var escapes = strings.NewReplacer(`\`, `\\`, "\n", `\n`, `"`, `\"`)

// parts are all metrics that have a sample, in parts to write one after the other.
func (s *sink) parts() (all [][]byte) {
	for _, m := range s.metrics {
		samples := *s.samples[m]
		if len(samples) == 0 {
			continue
		}
		head := "# HELP " + m.name + " " + strings.NewReplacer(`\`, `\\`, "\n", `\n`).Replace(m.help) + "\n# TYPE " + m.name + " " + m.kind + "\n"
		all = append(all, []byte(head), samples)
	}
	return all
}
