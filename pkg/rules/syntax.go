package rules

import (
	"bytes"
	"errors"
	"io"
	"strconv"
	"strings"

	"go.yaml.in/yaml/v3"
)

// syntaxFault converts an error of the YAML package into one with the wrong line. For a parser
// error ("did not find expected ...") the package reports only where the enclosing collection
// begins, and for some errors no line at all; then the line is found by parsing again.
func syntaxFault(data []byte, err error) *FileError {
	text := strings.TrimPrefix(err.Error(), "yaml: ")
	line := 0
	if rest, ok := strings.CutPrefix(text, "line "); ok {
		number, message, _ := strings.Cut(rest, ": ")
		if n, err := strconv.Atoi(number); err == nil {
			line, text = n, message
		}
	}
	if line == 0 || strings.HasPrefix(text, "did not find expected") {
		line = findSyntaxFault(data, err)
	}
	if strings.Contains(lineText(data, line), "]:") {
		text += ` (an endpoint that begins with "[" needs quotes)`
	}
	if line := strings.TrimLeft(lineText(data, line), " "); strings.HasPrefix(line, "\t") {
		text += " (indent with spaces: YAML does not allow tabs)"
	}
	return &FileError{Line: line, Err: errors.New(text)}
}

// findSyntaxFault is the first line up to which the file fails in the same way as the whole file,
// near the line where the parser stopped. The parser looks ahead at most one line, hence the few
// steps back.
func findSyntaxFault(data []byte, err error) int {
	r := &lineReader{data: data}
	_ = decodeAll(r) // fails as before
	line := r.line()
	for range 3 {
		if line <= 1 || !sameError(decodeAll(bytes.NewReader(firstLines(data, line-1))), err) {
			break
		}
		line--
	}
	return line
}

func sameError(a, b error) bool { return a != nil && a.Error() == b.Error() }

// decodeAll decodes documents until one fails; at the end that is io.EOF.
func decodeAll(r io.Reader) error {
	decoder := yaml.NewDecoder(r)
	for {
		if err := decoder.Decode(new(yaml.Node)); err != nil {
			return err
		}
	}
}

// lineReader returns one byte per read, and so tracks how far its reader got.
type lineReader struct {
	data []byte
	next int
}

func (r *lineReader) Read(p []byte) (int, error) {
	if r.next == len(r.data) {
		return 0, io.EOF
	}
	n := copy(p, r.data[r.next:r.next+1])
	r.next += n
	return n, nil
}

// line is the number of the last line read that is not blank.
func (r *lineReader) line() int {
	return 1 + bytes.Count(bytes.TrimRight(r.data[:r.next], " \t\r\n"), []byte{'\n'})
}

// firstLines is the data up to the end of a line.
func firstLines(data []byte, lines int) []byte {
	end := 0
	for range lines {
		i := bytes.IndexByte(data[end:], '\n')
		if i < 0 {
			return data
		}
		end += i + 1
	}
	return data[:end]
}

// lineText is one line of the data.
func lineText(data []byte, line int) string {
	return string(data[len(firstLines(data, line-1)):len(firstLines(data, line))])
}
