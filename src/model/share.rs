//! Which rows of the tables of items a rank holds.

use std::ops::Range;

use tch::{Kind, Tensor};

use super::ITEM_TABLES;
use crate::collective::{Collective, CollectiveError, Reduce, rows};

/// Bands that a catalogue is cut into at most, and of how many rows a band is a whole multiple: shares are whole bands, so that
/// sums over bands are the same on any number of ranks, wherever in memory a share begins.
const MOST_BANDS: i64 = 1024;
const ROWS: i64 = 16;

/// The rows of the tables of items that are here: all, or in a run with many ranks those of one.
#[derive(Clone)]
pub struct Share<'a> {
    /// The rows.
    pub rows: Range<i64>,
    /// Rows of all ranks, `V`.
    pub n_items: i64,
    /// Those who hold the others.
    company: Option<&'a dyn Collective>,
    /// Those who hold the same rows, and what their gradients travel as.
    copies: Option<(&'a dyn Collective, Kind)>,
    /// Whether what ranks add up together must not depend on their number: sums are then made band by band, for the targets of
    /// each rank alone, and in whole numbers.
    is_exact: bool,
}

impl<'a> Share<'a> {
    /// All rows.
    pub fn whole(n_items: i64) -> Self {
        Self { rows: 0..n_items, n_items, company: None, copies: None, is_exact: false }
    }

    /// All rows, which every rank has. Every rank makes one pass a step, in which gradients of the tables are added up over
    /// ranks, as `kind`.
    pub fn copy(n_items: i64, collective: &'a dyn Collective, kind: Kind) -> Self {
        let copies = (collective.world_size() > 1).then_some((collective, kind));
        Self { copies, ..Self::whole(n_items) }
    }

    /// A rank's, where every rank has its own. There must be [`Share::most_ranks`] of them at most.
    pub fn of_rank(n_items: i64, collective: &'a dyn Collective) -> Self {
        let rows = rows_of(n_items, collective.rank(), collective.world_size());
        Self { rows, n_items, company: Some(collective), copies: None, is_exact: false }
    }

    /// The same, with sums that do not depend on the number of ranks.
    #[must_use]
    pub fn exactly(self) -> Self {
        Self { is_exact: true, ..self }
    }

    /// See [`Share::exactly`].
    pub fn is_exact(&self) -> bool {
        self.is_exact
    }

    /// Which of the rows `[sum of counts]` of all ranks are worked on at a time: all, or where sums are exact those of one
    /// rank.
    pub fn groups(&self, counts: &[i64]) -> Vec<Range<i64>> {
        if !self.is_exact {
            return std::iter::once(0..counts.iter().sum()).collect();
        }
        rows::by_rank(counts).filter(|group| !group.is_empty()).collect()
    }

    /// Rows of a band: a share is whole bands.
    pub fn band(&self) -> i64 {
        band(self.n_items)
    }

    /// How many ranks can share tables of so many rows out.
    pub fn most_ranks(n_items: i64) -> usize {
        n_bands(n_items) as usize
    }

    /// Whether the tensor of this name, a parameter or of its optimizer, is a table of items.
    pub fn is_table(name: &str) -> bool {
        ITEM_TABLES
            .iter()
            .any(|table| name.strip_suffix(table).is_some_and(|of| of.is_empty() || of.ends_with('.')))
    }

    /// What is here of a whole tensor of this name.
    pub fn own_rows(&self, name: &str, whole: &Tensor) -> Tensor {
        match self.company.is_some() && Self::is_table(name) && whole.size()[0] == self.n_items {
            true => whole.narrow(0, self.rows.start, self.len()),
            false => whole.shallow_clone(),
        }
    }

    /// The rows of each rank, in rank order.
    pub fn by_rank(&self) -> Vec<Range<i64>> {
        let world_size = self.company.map_or(1, Collective::world_size);
        (0..world_size).map(|rank| rows_of(self.n_items, rank, world_size)).collect()
    }

    /// The ranks, where each has a share of its own.
    pub fn company(&self) -> Option<&'a dyn Collective> {
        self.company
    }

    /// The ranks that have the same rows and add up their gradients in a pass, and as what these travel.
    pub fn copies(&self) -> Option<(&'a dyn Collective, Kind)> {
        self.copies
    }

    /// Rows of the largest share.
    pub fn most_rows(&self) -> i64 {
        self.by_rank().iter().map(|rows| rows.end - rows.start).max().unwrap_or(0)
    }

    /// How many tiles of so many items each rank's rows are cut into.
    pub fn n_tiles_by_rank(&self, tile: i64) -> Vec<i64> {
        self.by_rank().into_iter().map(|rows| div_ceil(rows.end - rows.start, tile)).collect()
    }

    /// Number of rows here.
    pub fn len(&self) -> i64 {
        self.rows.end - self.rows.start
    }

    /// Whether no row is here.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Where items `[N]` stand in the share, i64 `[N]`, and, where others have rows too, 1 for those that do and 0 for those that
    /// only seem to: f32 `[N]`.
    pub fn places(&self, items: &Tensor) -> (Tensor, Option<Tensor>) {
        if self.company.is_none() {
            return (items.shallow_clone(), None);
        }
        let here = items.ge(self.rows.start).logical_and(&items.lt(self.rows.end)).to_kind(Kind::Float);
        ((items - self.rows.start).clamp(0, self.len() - 1), Some(here))
    }

    /// *All ranks.* What every rank has `n` of; alone, only its own.
    ///
    /// # Errors
    /// Those of the collective.
    pub fn counts(&self, n: i64) -> Result<Vec<i64>, CollectiveError> {
        self.company.map_or(Ok(vec![n]), |company| company.gather(&[n]))
    }

    /// *All ranks.* Rows `[n, ..]` of all ranks, one rank's after the other's, `counts` of each; alone, only its own.
    ///
    /// # Errors
    /// Those of the collective.
    pub fn gather_rows(&self, own: &Tensor, counts: &[i64]) -> Result<Tensor, CollectiveError> {
        self.company.map_or_else(|| Ok(own.shallow_clone()), |company| company.gather_rows(own, counts))
    }

    /// *All ranks.* Adds what each has of the rows of all, `[sum of counts, ..]`, up over ranks, and leaves each rank its own:
    /// `[n, ..]`.
    ///
    /// # Errors
    /// Those of the collective.
    pub fn scatter_rows(&self, of_all: &Tensor, counts: &[i64]) -> Result<Tensor, CollectiveError> {
        self.company
            .map_or_else(|| Ok(of_all.shallow_clone()), |company| company.scatter_rows(of_all, counts))
    }

    /// *All ranks.* `[..]` of every rank: `[ranks, ..]`; alone, only its own.
    ///
    /// # Errors
    /// Those of the collective.
    pub fn of_each_rank(&self, own: &Tensor) -> Result<Tensor, CollectiveError> {
        self.company.map_or_else(|| Ok(own.unsqueeze(0)), |company| company.of_each_rank(own))
    }

    /// *All ranks.* The logarithm of the sum over ranks of what `logs: [n]` are logarithms of.
    ///
    /// # Errors
    /// Those of the collective.
    pub fn sum_of_logs(&self, logs: Tensor) -> Result<Tensor, CollectiveError> {
        let Some(company) = self.company else { return Ok(logs) };
        let mut largest = logs.copy();
        company.all_reduce(&mut largest, Reduce::Max)?;
        let mut sums = (logs - &largest).exp();
        company.all_reduce(&mut sums, Reduce::Sum)?;
        Ok(largest + sums.log())
    }

    /// This rank's of rows `[sum of counts, ..]`.
    pub fn own_of(&self, of_all: &Tensor, counts: &[i64]) -> Tensor {
        let Some(company) = self.company else { return of_all.shallow_clone() };
        let first = counts[..company.rank()].iter().sum();
        of_all.narrow(0, first, counts[company.rank()])
    }

    /// *All ranks.* Asks for the rows of the items `[N]`, of which every rank has its own: as many as `counts` says.
    pub(super) fn ask(&self, items: &Tensor, counts: &[i64]) -> Result<Asked<'a>, CollectiveError> {
        let Some(company) = self.company else { return Ok(Asked::here(items)) };
        let (places, here) = self.places(&company.gather_rows(items, counts)?);
        Ok(Asked { places, others: Some(Others { company, counts: counts.to_vec(), here }) })
    }
}

/// Rows of a table that ranks have asked for, of which each holds some.
pub(super) struct Asked<'a> {
    /// The rows of all ranks, one rank's after the other's: i64. Rows that are elsewhere stand as any other.
    places: Tensor,
    others: Option<Others<'a>>,
}

struct Others<'a> {
    company: &'a dyn Collective,
    /// How many each rank asked for.
    counts: Vec<i64>,
    /// See [`Share::places`].
    here: Option<Tensor>,
}

impl<'a> Asked<'a> {
    /// Rows of a table that is whole here.
    pub fn here(rows: &Tensor) -> Self {
        Self { places: rows.shallow_clone(), others: None }
    }

    /// *All ranks.* The rows `[N, ..]` that this rank asked for. `rows`: those at given places.
    pub fn fetch(&self, rows: impl FnOnce(&Tensor) -> Tensor) -> Result<Tensor, CollectiveError> {
        let rows = rows(&self.places);
        match &self.others {
            Some(Others { company, counts, here }) => {
                company.scatter_rows(&if_here(rows, here.as_ref()), counts)
            }
            None => Ok(rows),
        }
    }

    /// *All ranks.* Gives back gradients `[N, ..]` of the rows that this rank asked for. `add`: adds gradients at given
    /// places; where sums are exact, those of one rank at a time.
    pub fn give_back(
        &self,
        share: &Share<'_>,
        gradients: &Tensor,
        mut add: impl FnMut(&Tensor, &Tensor),
    ) -> Result<(), CollectiveError> {
        let Some(Others { company, counts, here }) = &self.others else {
            add(&self.places, gradients);
            return Ok(());
        };
        let all = if_here(company.gather_rows(gradients, counts)?, here.as_ref());
        for Range { start, end } in share.groups(counts) {
            let of = |x: &Tensor| x.narrow(0, start, end - start);
            add(&of(&self.places), &of(&all));
        }
        Ok(())
    }
}

/// Rows `[N, ..]`, zero where they only seem to be here: see [`Share::places`].
pub(super) fn if_here(rows: Tensor, here: Option<&Tensor>) -> Tensor {
    match here {
        Some(here) if rows.dim() > 1 => rows * here.unsqueeze(1),
        Some(here) => rows * here,
        None => rows,
    }
}

/// The rows of a rank.
fn rows_of(n_items: i64, rank: usize, world_size: usize) -> Range<i64> {
    let start = |rank: usize| {
        let band_number = rank as i64 * n_bands(n_items) / world_size as i64;
        band_number.saturating_mul(band(n_items)).min(n_items)
    };
    start(rank)..start(rank + 1)
}

/// Rows of a band.
fn band(n_items: i64) -> i64 {
    div_ceil(div_ceil(n_items, MOST_BANDS), ROWS) * ROWS
}

fn n_bands(n_items: i64) -> i64 {
    div_ceil(n_items, band(n_items))
}

/// How many times `b` it takes to hold `a`, neither below zero.
pub(super) fn div_ceil(a: i64, b: i64) -> i64 {
    a / b + i64::from(a % b != 0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::collective::threads;

    #[test]
    fn shares_cover_the_catalogue_in_whole_bands() {
        for (n_items, world_size) in [(40, 3), (1000, 2), (1000, 7), (390_001, 8), (16, 1)] {
            let shares = threads::spawn(world_size, |collective| {
                let share = Share::of_rank(n_items, collective);
                (share.rows.clone(), share.most_rows())
            });
            assert_eq!((shares[0].0.start, shares[world_size - 1].0.end), (0, n_items));
            for (rows, most) in &shares {
                assert!(rows.start % band(n_items) == 0 && !rows.is_empty());
                assert!(rows.end - rows.start <= *most);
            }
            assert!(shares.windows(2).all(|two| two[0].0.end == two[1].0.start));
        }
    }

    #[test]
    fn tables_of_items_are_known_by_name() {
        for name in ["item_table.weight", "m.item_table.weight", "sum.item_table.bias", "v.head.table.weight"]
        {
            assert!(Share::is_table(name));
        }
        for name in ["tables.item_table.weight.x", "xitem_table.weight", "head.projection.weight"] {
            assert!(!Share::is_table(name), "{name}");
        }
    }
}
