//! `bireme report`: finished runs, side by side.
//!
//! Run directories → [`runs`] → [`compare`] (metrics with intervals by [`bootstrap`]) → `charts`,
//! `tables` and `pages` → a folder, written by [`write()`].

pub mod evaluation_file;
pub mod runs;
pub mod bootstrap;
pub mod compare;
pub mod plot;
mod charts;
mod tables;
mod pages;
mod write;

pub use write::{PAGE, WriteError, create, write};

/// Text of `results.txt`: NDCG@10, NDCG@20, Recall@10 and Recall@20 below a title.
pub fn results_text(title: &str, [ndcg_10, ndcg_20, recall_10, recall_20]: [f64; 4]) -> String {
    format!(
        "{title} accuracy results:\n\
         next-item/ndcg_at_10:{ndcg_10}\nnext-item/ndcg_at_20:{ndcg_20}\n\
         next-item/recall_at_10:{recall_10}\nnext-item/recall_at_20:{recall_20}\n"
    )
}
