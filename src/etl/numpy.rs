//! What `src/export/model.py`, which does [`Preprocessor::apply`] in Python, needs to know of a workflow, in forms
//! that numpy and Python's own library read.

use std::fs;
use std::path::Path;

use serde_json::json;

use crate::error::Error;
use crate::serving::Preprocessor;
use crate::vocab::{Coded, Value, Vocabulary};

impl Preprocessor {
    /// Writes into a folder, which must be there: `serving.json` as [`Preprocessor::save`] does; `workflow.json`, the
    /// statistics and the texts by ascending id from 2 on; and little-endian numbers of 8 bytes each, one row behind
    /// the other, in ascending order of the values: `products.bin` (value, id, seconds since 1970 of the first
    /// event) and `categories.bin` (value, id, mean price as float64).
    ///
    /// # Errors
    /// A file that cannot be written.
    pub fn save_for_numpy(&self, dir: &Path) -> Result<(), Error> {
        self.save_settings(dir)?;
        let workflow = self.workflow();
        let texts = |column: Coded| -> Vec<&str> {
            let vocabulary = workflow.vocabulary(column);
            let values = (Vocabulary::FIRST..).map_while(|id| vocabulary.value(id));
            values.filter_map(|value| if let Value::Text(text) = value { Some(text) } else { None }).collect()
        };
        let vocabularies: serde_json::Map<_, _> = [Coded::CategoryCode, Coded::Brand, Coded::EventType]
            .map(|column| (column.name().to_owned(), json!(texts(column))))
            .into_iter()
            .collect();
        let statistics = &workflow.statistics;
        let known = json!({
            "price_log": statistics.price_log,
            "recency_log": statistics.recency_log,
            "vocabularies": vocabularies,
        });
        write(&dir.join("workflow.json"), format!("{known:#}\n").as_bytes())?;
        write(&dir.join("products.bin"), &self.numbers(Coded::Product))?;
        write(&dir.join("categories.bin"), &self.numbers(Coded::Category))
    }

    /// The values of products or categories, their ids, and what else is known of each.
    fn numbers(&self, column: Coded) -> Vec<u8> {
        let workflow = self.workflow();
        let vocabulary = workflow.vocabulary(column);
        let ints = (1..=vocabulary.dictionary().len() as u32).filter_map(|code| {
            let Value::Int(value) = vocabulary.dictionary().value(code) else { return None };
            let known = match column {
                Coded::Product => workflow.first_seen(value).unwrap_or_default().to_le_bytes(),
                _ => workflow.mean_price(value).unwrap_or(f64::NAN).to_le_bytes(),
            };
            Some((value, i64::from(vocabulary.id(Value::Int(value))), known))
        });
        let mut rows: Vec<_> = ints.collect();
        rows.sort_unstable_by_key(|(value, ..)| *value);
        let values = rows.iter().map(|(value, ..)| value.to_le_bytes());
        let ids = rows.iter().map(|(_, id, _)| id.to_le_bytes());
        values.chain(ids).chain(rows.iter().map(|(.., known)| *known)).flatten().collect()
    }
}

fn write(path: &Path, bytes: &[u8]) -> Result<(), Error> {
    fs::write(path, bytes).map_err(Error::io("write", path))
}
