//! Quotes commands for a shell.

/// One line that a shell splits into `words`.
pub fn quoted(words: &[String]) -> String {
    words.iter().map(|word| quoted_word(word)).collect::<Vec<_>>().join(" ")
}

fn quoted_word(word: &str) -> String {
    let is_plain = |c: char| c.is_ascii_alphanumeric() || "-_=./:,".contains(c);
    if !word.is_empty() && word.chars().all(is_plain) {
        word.to_owned()
    } else {
        format!("'{}'", word.replace('\'', r"'\''"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_shell_reads_the_words_back() {
        let words = ["echo", "a=1,b", "", "it's", "$HOME `x` \"\\\n"].map(str::to_owned);
        assert_eq!(quoted(&words[..4]), r"echo a=1,b '' 'it'\''s'");
        let script = quoted(&[&["printf".to_owned(), "%s|".to_owned()], &words[1..]].concat());
        let output = std::process::Command::new("sh").args(["-c", &script]).output().unwrap();
        assert_eq!(String::from_utf8(output.stdout).unwrap(), words[1..].join("|") + "|");
    }
}
