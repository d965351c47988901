/* What each transformation changes in the channels of a tile: squared deviations from a reference column, or from the
 * mean of the row, times `factor`. */

#ifndef LIGHTNING_INVARIANCE_CHANGES_H
#define LIGHTNING_INVARIANCE_CHANGES_H

#include "tiles.h"

#include <string.h>

/* Adds the squared changes of up to WIDTH activations under one transformation to their channels. */
INLINE void add_to_channels(const double *changed, double *channels, Py_ssize_t first, const job *j, int width)
{
    Py_ssize_t channel = first / j->inner % j->channels, left = j->inner - first % j->inner;
    for (int l = 0; l < width;) {
        const int end = width - l < left ? width : l + (int)left;
        double sums[4] = {0};
        for (; l + 4 <= end; l += 4)
            for (int i = 0; i < 4; i++)
                sums[i] += changed[l + i];
        for (; l < end; l++)
            sums[0] += changed[l];
        channels[channel] += ((sums[0] + sums[1]) + (sums[2] + sums[3])) * j->factor;
        channel = channel + 1 < j->channels ? channel + 1 : 0;
        left = j->inner;
    }
}

/* Adds the squared changes of WIDTH activations under each transformation to their channels. Where WIDTH neighbours
 * belong to one channel, `changed[t][0]` holds all of them. */
INLINE void add_changes(tile p, const job *j, lanes changed[][REGISTERS], enum changes changes)
{
    const int width = changes == OF_ONE_CHANNEL ? LANES : WIDTH;
    for (Py_ssize_t t = 0; t < j->m; t++) {
        float narrow[WIDTH];
        double values[WIDTH];
        memcpy(narrow, changed[t], (size_t)width * sizeof(float));
        for (int l = 0; l < width; l++)
            values[l] = narrow[l];
        add_to_channels(values, p.changes + t * j->channels, p.first, j, width);
    }
}

/* The changes of up to WIDTH activations from the means of the rows in double. */
INLINE void centred_in_double(tile p, const job *j, int width)
{
    for (Py_ssize_t i = 0; i < j->n; i++) {
        const float *const row = p.x + i * p.row_stride;
        double mean[WIDTH] = {0}, changed[WIDTH];
        for (Py_ssize_t t = 1; t < j->m; t++)
            for (int l = 0; l < width; l++)
                mean[l] += (double)row[t * p.column_stride + l] - row[l];
        for (int l = 0; l < width; l++)
            mean[l] /= (double)j->m;
        for (Py_ssize_t t = 0; t < j->m; t++) {
            for (int l = 0; l < width; l++) {
                const double c = ((double)row[t * p.column_stride + l] - row[l]) - mean[l];
                changed[l] = c * c;
            }
            add_to_channels(changed, p.changes + t * j->channels, p.first, j, width);
        }
    }
}

/* The changes of up to WIDTH activations from the reference column in double. */
INLINE void changes_in_double(tile p, const job *j, int width)
{
    for (Py_ssize_t t = 0; t < j->m; t++) {
        double changed[WIDTH] = {0};
        for (Py_ssize_t i = 0; i < j->n; i++) {
            const float *const value = p.x + i * p.row_stride + t * p.column_stride;
            const float *const reference = p.x + i * p.row_stride + j->reference * p.column_stride;
            for (int l = 0; l < width; l++) {
                const double a = (double)value[l] - reference[l];
                changed[l] += a * a;
            }
        }
        add_to_channels(changed, p.changes + t * j->channels, p.first, j, width);
    }
}

#endif
