package control

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"testing"
)

// Metrics are read as everything else is: by those who may read, and only where the daemon has them.
func TestMetricsOnTheSocket(t *testing.T) {
	page := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { fmt.Fprint(w, "metrics of ", r.URL.Path) })
	for _, tt := range []struct {
		metrics http.Handler
		method  string
		code    int
		want    string
	}{
		{page, http.MethodGet, http.StatusOK, "metrics of /v1/metrics"},
		{page, http.MethodPost, http.StatusMethodNotAllowed, "method POST is not for this endpoint: use GET"},
		{nil, http.MethodGet, http.StatusNotFound, "no endpoint /v1/metrics"},
	} {
		socket := serve(t, &fake{}, Options{Metrics: tt.metrics})
		client := &http.Client{Transport: &http.Transport{DisableKeepAlives: true, DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return (&net.Dialer{}).DialContext(ctx, "unix", socket)
		}}}
		request, err := http.NewRequestWithContext(t.Context(), tt.method, "http://xdpcast/v1/metrics", nil)
		if err != nil {
			t.Fatal(err)
		}
		answer, err := client.Do(request)
		if err != nil {
			t.Fatal(err)
		}
		text, err := io.ReadAll(answer.Body)
		answer.Body.Close()
		if answer.StatusCode != tt.code || !strings.Contains(string(text), tt.want) || err != nil {
			t.Errorf("%s: %d %s (%v), want %d with %q", tt.method, answer.StatusCode, text, err, tt.code, tt.want)
		}
	}
}
