package control

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/http"
	"net/url"
	"os"
	"strconv"
	"strings"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"xdpcast/pkg/rules"
)

const (
	// clientTimeout exceeds any time that a server takes.
	clientTimeout = 90 * time.Second
	// slowAfter is when a client reports that it waits, and how long it tries to connect to a
	// daemon whose queue is full.
	slowAfter = 2 * time.Second
	// queuePause is the delay between these attempts.
	queuePause = 20 * time.Millisecond
	// maxAnswer limits the size of an answer, in bytes: the statistics of 100,000 rules fit several
	// times over.
	maxAnswer = 1 << 30
	// expectOver is the length from which a body is sent only once the server requests it (RFC 9110
	// section 10.1.1): a server that refuses without reading closes the connection, and the failing
	// write could lose its answer.
	expectOver = 32 << 10
)

// Client speaks to the daemon behind a socket. It is safe for concurrent use and holds nothing open
// between calls.
//
// Every method can fail with ErrNotRunning if no daemon listens, with ErrForbidden, and with
// ErrUnavailable if the daemon does not answer.
type Client struct {
	// Slow is called with a message for the user when a call has had no answer for 2 seconds; the
	// call continues. Nil: not called. Set it before the first call; it is called from other
	// goroutines.
	Slow func(line string)

	socket string
	http   http.Client
}

var _ Backend = (*Client)(nil)

// NewClient returns a client of the daemon behind socket; it does not connect yet.
func NewClient(socket string) *Client {
	dial := func(ctx context.Context, _, _ string) (net.Conn, error) { return dial(ctx, socket) }
	return &Client{socket: socket, http: http.Client{
		// One connection per call: a waiting client does not hold up others.
		Transport: &http.Transport{
			DialContext: dial, DisableKeepAlives: true, DisableCompression: true,
			ExpectContinueTimeout: 5 * time.Second,
		},
		Timeout: clientTimeout,
	}}
}

// dial connects to a socket. It retries while the socket's queue is full, which only means many
// simultaneous clients.
func dial(ctx context.Context, socket string) (net.Conn, error) {
	var d net.Dialer
	for end := time.Now().Add(slowAfter); ; {
		c, err := d.DialContext(ctx, "unix", socket)
		if err == nil {
			if w, ok := ctx.Value(waitKey{}).(*wait); ok {
				w.connected(c)
			}
			return c, nil
		}
		if !errors.Is(err, unix.EAGAIN) || time.Now().After(end) {
			return nil, err
		}
		select {
		case <-ctx.Done():
			return nil, ctx.Err()
		case <-time.After(queuePause):
		}
	}
}

// wait is a call waiting for its answer.
type wait struct{ pid atomic.Int32 } // of the daemon, 0 while unknown

// waitKey is the context key of a call's *wait.
type waitKey struct{}

func (w *wait) connected(c net.Conn) {
	if u, ok := c.(*net.UnixConn); ok {
		if p, err := peerOf(u); err == nil {
			w.pid.Store(p.pid)
		}
	}
}

// line says what the call waits for.
func (w *wait) line(socket string) string {
	who, why := "xdpcast", "it is busy, or hangs"
	if pid := w.pid.Load(); pid > 0 {
		who = fmt.Sprintf("xdpcast (process %d)", pid)
		if isStopped(pid) {
			why = fmt.Sprintf("it is stopped: kill -CONT %d resumes it", pid)
		}
	}
	return fmt.Sprintf("no answer from %s at %s for %v, waiting up to %v: %s", who, socket, slowAfter, clientTimeout, why)
}

// isStopped says whether a process is stopped, by a signal or a tracer (proc_pid_stat(5)).
func isStopped(pid int32) bool {
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return false
	}
	_, state, _ := strings.Cut(string(stat), ") ") // after the name, which may contain anything
	return strings.HasPrefix(state, "T") || strings.HasPrefix(state, "t")
}

// Status implements Backend.
func (c *Client) Status(ctx context.Context) (Status, error) {
	return ask[Status](ctx, c, http.MethodGet, "/v1/status", nil)
}

// Rules implements Backend.
func (c *Client) Rules(ctx context.Context) ([]RuleStatus, error) {
	return ask[[]RuleStatus](ctx, c, http.MethodGet, "/v1/rules", nil)
}

// Rule implements Backend.
func (c *Client) Rule(ctx context.Context, name string) (RuleStatus, error) {
	path, err := rulePath(name)
	if err != nil {
		return RuleStatus{}, err
	}
	return ask[RuleStatus](ctx, c, http.MethodGet, path, nil)
}

// AddRule implements Backend.
func (c *Client) AddRule(ctx context.Context, rule Rule) (RuleStatus, error) {
	rule.fill()
	return ask[RuleStatus](ctx, c, http.MethodPost, "/v1/rules", rule)
}

// DeleteRule implements Backend.
func (c *Client) DeleteRule(ctx context.Context, name string) error {
	path, err := rulePath(name)
	if err != nil {
		return err
	}
	return c.call(ctx, http.MethodDelete, path, nil, nil)
}

// Apply implements Backend.
func (c *Client) Apply(ctx context.Context, all []rules.Rule, o ApplyOptions) (ApplyResult, error) {
	file, err := rules.FormatFile(all)
	if err != nil {
		return ApplyResult{}, Wrap(KindInvalid, err)
	}
	return c.ApplyFile(ctx, file, o)
}

// ApplyFile is Apply with the text of a rule file (rules.ParseFile).
func (c *Client) ApplyFile(ctx context.Context, file []byte, o ApplyOptions) (ApplyResult, error) {
	return ask[ApplyResult](ctx, c, http.MethodPut, "/v1/rules"+o.query(), rulesFile(file))
}

// query is the options as a URL query.
func (o ApplyOptions) query() string { return o.queryWith(url.Values{}) }

func (o ApplyOptions) queryWith(q url.Values) string {
	if o.DryRun {
		q.Set(queryDryRun, "true")
	}
	if o.MaxChanges > 0 {
		q.Set(queryMaxChanges, strconv.Itoa(o.MaxChanges))
	}
	if o.Confirm != 0 {
		q.Set(queryConfirm, o.Confirm.String())
	}
	if o.Revision != "" {
		q.Set(queryRevision, o.Revision)
	}
	if len(q) == 0 {
		return ""
	}
	return "?" + q.Encode()
}

// Groups implements Backend.
func (c *Client) Groups(ctx context.Context) ([]Group, error) {
	return ask[[]Group](ctx, c, http.MethodGet, "/v1/groups", nil)
}

// Stats implements Backend.
func (c *Client) Stats(ctx context.Context) (Stats, error) {
	return ask[Stats](ctx, c, http.MethodGet, "/v1/stats", nil)
}

// Explain implements Backend.
func (c *Client) Explain(ctx context.Context, packet string) (Explanation, error) {
	return ask[Explanation](ctx, c, http.MethodGet, "/v1/explain?packet="+url.QueryEscape(packet), nil)
}

// Reload implements Backend.
func (c *Client) Reload(ctx context.Context, o ApplyOptions) (ApplyResult, error) {
	return ask[ApplyResult](ctx, c, http.MethodPost, "/v1/reload"+o.query(), nil)
}

// Confirm implements Backend.
func (c *Client) Confirm(ctx context.Context) (UnconfirmedChange, error) {
	return ask[UnconfirmedChange](ctx, c, http.MethodPost, "/v1/confirm", nil)
}

// History implements Backend.
func (c *Client) History(ctx context.Context) ([]HistoryEntry, error) {
	return ask[[]HistoryEntry](ctx, c, http.MethodGet, "/v1/history", nil)
}

// Rollback implements Backend.
func (c *Client) Rollback(ctx context.Context, back int, o ApplyOptions) (ApplyResult, error) {
	q := url.Values{queryBack: {strconv.Itoa(back)}}
	return ask[ApplyResult](ctx, c, http.MethodPost, "/v1/rollback"+o.queryWith(q), nil)
}

// Upgrade replaces the daemon with the binary at its path, and returns when that is ready, within
// timeout. After an error the old daemon keeps running.
func (c *Client) Upgrade(ctx context.Context, timeout time.Duration) (UpgradeResult, error) {
	return ask[UpgradeResult](ctx, c, http.MethodPost, "/v1/upgrade?timeout="+timeout.String(), nil)
}

// rulesFile is a body that is a rule file rather than JSON.
type rulesFile []byte

// ask is call with an answer of type T.
func ask[T any](ctx context.Context, c *Client, method, path string, in any) (T, error) {
	var v T
	err := c.call(ctx, method, path, in, &v)
	return v, err
}

// rulePath is the path of one rule. Dots are escaped too, or a rule named ".." would refer to the
// parent path.
func rulePath(name string) (string, error) {
	if name == "" {
		return "", Errorf(KindInvalid, "rule name is empty")
	}
	return "/v1/rules/" + strings.ReplaceAll(url.PathEscape(name), ".", "%2E"), nil
}

// call sends one request and decodes the answer into out, unless that is nil.
func (c *Client) call(ctx context.Context, method, path string, in, out any) error {
	req, err := request(ctx, method, path, in)
	if err != nil {
		return err
	}
	w := &wait{}
	if c.Slow != nil {
		slow := time.AfterFunc(slowAfter, func() { c.Slow(w.line(c.socket)) })
		defer slow.Stop()
	}
	resp, err := c.http.Do(req.WithContext(context.WithValue(ctx, waitKey{}, w)))
	if err != nil {
		return c.transportError(ctx, err)
	}
	defer resp.Body.Close()
	answer := io.LimitReader(resp.Body, maxAnswer)
	if resp.StatusCode >= 300 {
		return c.answeredError(resp.StatusCode, answer)
	}
	if out == nil {
		return nil
	}
	if err := json.NewDecoder(answer).Decode(out); err != nil {
		if ctx.Err() != nil {
			return ctx.Err()
		}
		return Errorf(KindUnavailable, "answer from %s: %w", c.socket, err)
	}
	return nil
}

func request(ctx context.Context, method, path string, in any) (*http.Request, error) {
	data, isFile := in.(rulesFile)
	if in != nil && !isFile {
		var err error
		if data, err = json.Marshal(in); err != nil {
			return nil, fmt.Errorf("control: %w", err)
		}
	}
	if len(data) > MaxBody {
		return nil, Errorf(KindTooLarge, "request of %d bytes: want at most %d", len(data), MaxBody)
	}
	req, err := http.NewRequestWithContext(ctx, method, "http://xdpcast"+path, bytes.NewReader(data))
	if err != nil {
		return nil, fmt.Errorf("control: %w", err)
	}
	if isFile {
		req.Header.Set("Content-Type", yamlType)
	}
	if len(data) > expectOver {
		req.Header.Set("Expect", "100-continue")
	}
	return req, nil
}

// transportError explains to the user why there is no answer.
func (c *Client) transportError(ctx context.Context, err error) error {
	switch {
	case ctx.Err() != nil:
		return ctx.Err()
	case errors.Is(err, unix.ECONNREFUSED), errors.Is(err, fs.ErrNotExist):
		return fmt.Errorf("%w (no answer at %s): start one with \"xdpcast run\"", ErrNotRunning, c.socket)
	case errors.Is(err, fs.ErrPermission):
		return Errorf(KindForbidden, "not allowed to reach %s: root is needed", c.socket)
	case errors.Is(err, unix.EAGAIN):
		return Errorf(KindUnavailable, "xdpcast at %s is too busy to answer: try again", c.socket)
	}
	var urlErr *url.Error
	if errors.As(err, &urlErr) {
		err = urlErr.Err // without the method and the placeholder URL
	}
	return Errorf(KindUnavailable, "no answer from xdpcast at %s: %w", c.socket, err)
}

// answeredError converts the body of an error answer into the server's error.
func (c *Client) answeredError(status int, body io.Reader) error {
	var e errorAnswer
	data, err := io.ReadAll(io.LimitReader(body, 64<<10))
	if err == nil {
		err = json.Unmarshal(data, &e)
	}
	if err != nil || e.Error == "" {
		return Errorf(KindUnavailable, "the server at %s (%d %s) is not xdpcast", c.socket, status, http.StatusText(status))
	}
	return &Error{Kind: e.Kind, Msg: e.Error}
}
