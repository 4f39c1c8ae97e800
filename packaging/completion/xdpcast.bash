# Completion of xdpcast for bash: the program says what may come next.

_xdpcast() {
	local cur words cword line
	_get_comp_words_by_ref -n "=:@%" cur words cword || return
	words=("${words[@]:0:cword}")
	if [[ $cur = -* ]]; then words+=("$cur"); else words+=(""); fi
	COMPREPLY=()
	while IFS= read -r line; do
		[[ $line != "$cur"* ]] || COMPREPLY+=("$line")
	done < <("${words[@]}" --generate-bash-completion 2>/dev/null)
}

complete -o bashdefault -o default -F _xdpcast xdpcast
