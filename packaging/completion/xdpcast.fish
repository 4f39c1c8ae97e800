# Completion of xdpcast for fish: the program says what may come next.

function __xdpcast_complete
    set -l before (commandline -opc)
    set -l current (commandline -ct)
    if string match -q -- '-*' $current
        set -a before $current
    else
        set -a before ''
    end
    set -l program $before[1]
    set -e before[1]
    set -l candidates (command $program $before --generate-bash-completion 2>/dev/null)
    if test (count $candidates) -gt 0
        printf '%s\n' $candidates
    else
        __fish_complete_path $current
    end
end

complete -c xdpcast -f -a '(__xdpcast_complete)'
