//! Reads Rust sources as tokens, so that comments and strings do not count.

use std::fs;
use std::path::{Path, PathBuf};

use proc_macro2::{Delimiter, TokenStream, TokenTree};

use super::files::{files_below, root};

/// A source file without the items under `#[cfg(test)]`.
pub struct Source {
    /// From the root of the repository.
    pub path: PathBuf,
    tokens: Vec<Token>,
}

/// A word, a bracket or a character of an operator. A literal is empty.
struct Token {
    text: String,
    line: usize,
}

/// All Rust sources below a folder of the repository.
pub fn sources(folder: &str) -> Vec<Source> {
    let mut paths = files_below(&root().join(folder));
    paths.retain(|path| path.extension().is_some_and(|extension| extension == "rs"));
    paths.iter().map(|path| Source::read(path.strip_prefix(root()).unwrap())).collect()
}

impl Source {
    pub fn read(path: &Path) -> Self {
        let text = fs::read_to_string(root().join(path)).unwrap();
        let stream: TokenStream =
            text.parse().unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        let mut tokens = Vec::new();
        flatten(stream, &mut tokens);
        Self { path: path.to_owned(), tokens }
    }

    pub fn path(&self) -> &str {
        self.path.to_str().unwrap()
    }

    /// Lines at which these tokens follow each other.
    pub fn lines_with(&self, tokens: &[&str]) -> Vec<usize> {
        let starts = (0..self.tokens.len()).filter(|&i| self.has_at(i, tokens));
        starts.map(|i| self.tokens[i].line).collect()
    }

    /// Words between two token sequences, such as `pub mod` and `;`.
    pub fn words_between(&self, before: &[&str], after: &str) -> Vec<&str> {
        let starts = (0..self.tokens.len()).filter(|&i| self.has_at(i, before));
        let words = starts.map(|i| i + before.len()).filter(|&i| self.has_at(i + 1, &[after]));
        words.map(|i| self.tokens[i].text.as_str()).collect()
    }

    /// First segments, with their lines, of the paths below `crate`, which `use` may put in braces.
    pub fn crate_paths(&self) -> Vec<(&str, usize)> {
        let starts = (0..self.tokens.len()).filter(|&i| self.has_at(i, &["crate", ":", ":"]));
        let mut paths = Vec::new();
        for start in starts.map(|i| i + 3) {
            if self.has_at(start, &["{"]) {
                paths.extend(self.first_words_of_group(start));
            } else {
                paths.push(start);
            }
        }
        paths.iter().map(|&i| (self.tokens[i].text.as_str(), self.tokens[i].line)).collect()
    }

    /// Lines of the paths that start with an extern crate.
    pub fn extern_paths(&self, name: &str) -> Vec<usize> {
        // `use super::mpi` gives a module the name of the crate.
        let is_shadowed = (0..self.tokens.len())
            .any(|i| self.has_at(i, &[":", ":", name]) && !self.has_at(i + 3, &[":", ":"]));
        if is_shadowed || self.shadows_in_group(name) {
            return Vec::new();
        }
        let starts = (0..self.tokens.len()).filter(|&i| {
            let is_first = i == 0 || self.tokens[i - 1].text != ":";
            is_first && self.has_at(i, &[name, ":", ":"])
        });
        starts.map(|i| self.tokens[i].line).collect()
    }

    /// Whether `use crate::…::{…, name, …}` imports a module of this name.
    fn shadows_in_group(&self, name: &str) -> bool {
        let groups = (0..self.tokens.len()).filter(|&i| self.has_at(i, &[":", ":", "{"]));
        groups
            .flat_map(|i| self.first_words_of_group(i + 2))
            .any(|i| self.tokens[i].text == name && !self.has_at(i + 1, &[":", ":"]))
    }

    /// Indices of the first word, at depth 1, of each part of a group in braces.
    fn first_words_of_group(&self, open: usize) -> Vec<usize> {
        let mut depth = 0;
        let mut words = Vec::new();
        for i in open.. {
            match self.tokens[i].text.as_str() {
                "{" => depth += 1,
                "}" => depth -= 1,
                _ => {}
            }
            if depth == 0 {
                return words;
            }
            let starts_part = ["{", ","].contains(&self.tokens[i].text.as_str());
            if depth == 1 && starts_part && !self.has_at(i + 1, &["}"]) {
                words.push(i + 1);
            }
        }
        words
    }

    fn has_at(&self, start: usize, tokens: &[&str]) -> bool {
        let found = self.tokens.iter().skip(start).map(|token| token.text.as_str());
        found.take(tokens.len()).eq(tokens.iter().copied())
    }
}

fn flatten(stream: TokenStream, tokens: &mut Vec<Token>) {
    let mut trees = stream.into_iter().peekable();
    while let Some(tree) = trees.next() {
        let line = tree.span().start().line;
        if is_punct(&tree, '#') && trees.peek().is_some_and(is_test_condition) {
            // Leave the item out, up to its block or semicolon.
            trees.by_ref().find(|tree| match tree {
                TokenTree::Group(group) => group.delimiter() == Delimiter::Brace,
                tree => is_punct(tree, ';'),
            });
            continue;
        }
        match tree {
            TokenTree::Group(group) => {
                let (open, close) = match group.delimiter() {
                    Delimiter::Brace => ("{", "}"),
                    Delimiter::Bracket => ("[", "]"),
                    Delimiter::Parenthesis => ("(", ")"),
                    Delimiter::None => ("", ""),
                };
                tokens.push(Token { text: open.to_owned(), line });
                flatten(group.stream(), tokens);
                let line = group.span_close().start().line;
                tokens.push(Token { text: close.to_owned(), line });
            }
            TokenTree::Literal(_) => tokens.push(Token { text: String::new(), line }),
            other => tokens.push(Token { text: other.to_string(), line }),
        }
    }
}

fn is_punct(tree: &TokenTree, character: char) -> bool {
    matches!(tree, TokenTree::Punct(punct) if punct.as_char() == character)
}

/// Whether this is `[cfg(test)]`.
fn is_test_condition(tree: &TokenTree) -> bool {
    let TokenTree::Group(group) = tree else { return false };
    group.stream().to_string().replace(' ', "") == "cfg(test)"
}
