/* Runs one call of native.c on another kind of CPU, under an emulator. test_native_elsewhere.py
   writes the call's arguments and memory into the file that is the first argument, and reads the
   memory back from it: the number of pieces of memory and of pointers, each piece's address and
   size, the places of pointers in the structure, the structure, and the contents of the pieces. */

#include "../kernels/native.c"

#include <stdio.h>

static void need(int true)
{
    if (!true) {
        perror("native_elsewhere");
        exit(1);
    }
}

static void get(void *to, size_t size, FILE *file) { need(fread(to, 1, size, file) == size); }

int main(int count, char **arguments)
{
    need(count == 2);
    FILE *file = fopen(arguments[1], "r+b");
    need(file != NULL);
    uint64_t pieces, pointers, piece[64][2], place[64];
    Problem problem;
    char *memory[64];
    get(&pieces, 8, file);
    get(&pointers, 8, file);
    need(pieces <= 64 && pointers <= 64);
    get(piece, 16 * pieces, file);
    get(place, 8 * pointers, file);
    get(&problem, sizeof problem, file);
    long contents = ftell(file);
    for (uint64_t n = 0; n < pieces; n++) {
        /* Of its own, so that an access outside of it can be noticed. */
        need((memory[n] = malloc(piece[n][1] ? piece[n][1] : 1)) != NULL);
        get(memory[n], piece[n][1], file);
    }
    for (uint64_t n = 0; n < pointers; n++) {
        char **pointer = (char **)((char *)&problem + place[n]);
        uint64_t at = (uint64_t)*pointer, moved = 0;
        for (uint64_t m = 0; m < pieces && at && !moved; m++)
            if (at >= piece[m][0] && at < piece[m][0] + (piece[m][1] ? piece[m][1] : 1)) {
                *pointer = memory[m] + (at - piece[m][0]);
                moved = 1;
            }
        need(!at || moved);
    }
    need(dittfast_attend(&problem) == OK);
    need(fseek(file, contents, SEEK_SET) == 0);
    for (uint64_t n = 0; n < pieces; n++)
        need(fwrite(memory[n], 1, piece[n][1], file) == piece[n][1]);
    need(fclose(file) == 0);
    puts(dittfast_instructions());
    return 0;
}
