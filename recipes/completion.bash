# Completes verbs, flags and files of `python recipes/NAME.py …` and `torchrun … recipes/NAME.py …`, at once: the names stand
# in completion.txt, which `make reference` writes. In ~/.bashrc:  source PATH/recipes/completion.bash
# In ~/.zshrc:  autoload -U +X bashcompinit && bashcompinit && source PATH/recipes/completion.bash

_recipes_folder="$(cd "$(dirname "${BASH_SOURCE[0]:-$0}")" && pwd)"

_recipes() {
    local word="${COMP_WORDS[COMP_CWORD]}" place recipe="" verb="-" line
    for ((place = 1; place < COMP_CWORD; place++)); do
        case "${COMP_WORDS[place]}" in
            */recipes/*.py | recipes/*.py)
                recipe="$(basename "${COMP_WORDS[place]}" .py)"
                if [[ "${COMP_WORDS[place + 1]}" =~ ^[a-z]+$ ]] && ((place + 1 < COMP_CWORD)); then
                    verb="${COMP_WORDS[place + 1]}"
                fi
                break
                ;;
        esac
    done
    COMPREPLY=()
    if [[ -z "$recipe" || ("$word" != -* && "$verb" != "-") ]]; then
        return
    fi
    if [[ "$word" != -* ]]; then
        line="$(awk -v r="$recipe" '$1 == r && $2 != "-" { print $2 }' "$_recipes_folder/completion.txt")"
        case "$recipe" in pretrain | finetune | distill) line="$line validate test predict explain verify" ;; esac
        COMPREPLY=($(compgen -W "$line" -- "$word"))
        return
    fi
    case "$verb" in validate | test | predict | explain | verify) verb="fit" ;; esac
    line="$(awk -v r="$recipe" -v v="$verb" '$1 == r && ($2 == v || $2 == "-") { $1 = $2 = ""; print }' "$_recipes_folder/completion.txt")"
    COMPREPLY=($(compgen -W "$line" -- "$word"))
}

complete -o default -F _recipes python python3 torchrun
