//! Tables of text, for the terminal and for Markdown.

/// Alignment of a column.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Align {
    /// Text.
    Left,
    /// Numbers.
    Right,
}

/// One line per row, each column as wide as its longest cell, with two spaces between columns.
pub fn aligned<const N: usize>(columns: [Align; N], rows: &[[String; N]]) -> Vec<String> {
    let width =
        |column: usize| rows.iter().map(|row| row[column].chars().count()).max().unwrap_or(0);
    let widths: [usize; N] = std::array::from_fn(width);
    let line = |row: &[String; N]| {
        let cells = row.iter().zip(columns).zip(widths).map(|((cell, align), width)| match align {
            Align::Left => format!("{cell:width$}"),
            Align::Right => format!("{cell:>width$}"),
        });
        cells.collect::<Vec<_>>().join("  ").trim_end().to_owned()
    };
    rows.iter().map(line).collect()
}

/// A Markdown table whose cells are Markdown already; see [`markdown_text`].
pub fn markdown(columns: &[(&str, Align)], rows: &[Vec<String>]) -> String {
    let line = |cells: Vec<&str>| format!("| {} |\n", cells.join(" | "));
    let rule = columns.iter().map(|&(_, align)| if align == Align::Left { "---" } else { "---:" });
    let mut text = line(columns.iter().map(|&(name, _)| name).collect());
    text.push_str(&line(rule.collect()));
    rows.iter().for_each(|row| text.push_str(&line(row.iter().map(String::as_str).collect())));
    text
}

/// `text` on one line, with the characters escaped that Markdown or HTML would interpret.
pub fn markdown_text(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for letter in text.chars() {
        match letter {
            '\\' | '|' | '*' | '_' | '[' | ']' | '#' | '~' => escaped.extend(['\\', letter]),
            '<' => escaped.push_str("&lt;"),
            '>' => escaped.push_str("&gt;"),
            '&' => escaped.push_str("&amp;"),
            _ if letter.is_control() => escaped.push(' '),
            _ => escaped.push(letter),
        }
    }
    escaped
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_as_wide_as_their_longest_cells() {
        let rows = [["1", "käse", "9.50"], ["10", "-", "100.00"]].map(|row| row.map(str::to_owned));
        let lines = aligned([Align::Right, Align::Left, Align::Right], &rows);
        assert_eq!(lines, [" 1  käse    9.50", "10  -     100.00"]);
        assert!(aligned([Align::Left], &[]).is_empty());
    }

    #[test]
    fn markdown_tables_keep_their_columns_whatever_a_cell_holds() {
        let rows = [vec![markdown_text("a|b\n<c>"), "1".to_owned()]];
        let table = markdown(&[("", Align::Left), ("n", Align::Right)], &rows);
        assert_eq!(table, "|  | n |\n| --- | ---: |\n| a\\|b &lt;c&gt; | 1 |\n");
    }
}
